"""Recipes: what a line means, and what is wrong with it. How they are applied is in convert/test_quants.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from hymoe.errors import UnsupportedError
from hymoe.imatrix import recipe

SHAPES = {f"blk.{il}.{name}.weight": (256, 512) for il in range(12) for name in ("attn_q", "attn_k", "ffn_down_exps")}


def test_the_first_line_that_matches_decides() -> None:
    rules = recipe.parse("r", "blk\\.1\\. = q6_k\n  attn_q=Q8_0 # comment\n\n# nothing\n.=BF16\n")
    chosen = rules.choose(SHAPES)
    assert len(chosen) == len(SHAPES)
    assert {chosen[f"blk.1.{name}.weight"].name for name in ("attn_q", "attn_k", "ffn_down_exps")} == {"Q6_K"}
    assert chosen["blk.10.attn_q.weight"].name == "Q8_0"
    assert chosen["blk.10.attn_k.weight"].name == "BF16"


def test_tensors_that_no_line_names_are_left_alone() -> None:
    assert set(recipe.parse("r", "attn_q = Q8_0").choose(SHAPES)) == {name for name in SHAPES if "attn_q" in name}


def test_a_line_that_others_hide_is_no_mistake() -> None:
    chosen = recipe.parse("r", "attn = Q8_0\nattn_q = Q4_K").choose(SHAPES)
    assert {qtype.name for qtype in chosen.values()} == {"Q8_0"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "r: recipe: got no rule"),
        ("# only\n\n", "r: recipe: got no rule"),
        ("attn_q = Q8_0\nattn_k Q8_0", "r, line 2: got 'attn_k Q8_0', expected `pattern = TYPE`"),
        ("= Q8_0", "r, line 1: got '= Q8_0', expected"),
        ("attn_q =", "r, line 1: got 'attn_q =', expected"),
        ("attn_q = Q4_K_M", "r, line 1: got the type Q4_K_M, expected one of F32, F16, BF16, Q8_0, Q6_K"),
        ("attn_(q = Q8_0", "r, line 1: not a regular expression: got attn_(q (missing ), unterminated subpattern"),
    ],
)
def test_lines_that_mean_nothing(text: str, says: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        recipe.parse("r", text)
    assert str(caught.value).startswith(says)


def test_files(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="No such file"):
        recipe.read(tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"\xff\xfe = Q8_0")
    with pytest.raises(UnsupportedError, match="binary: recipe: got no UTF-8 text"):
        recipe.read(tmp_path / "binary")
    (tmp_path / "long").write_bytes(b"#" * (recipe.MAX_BYTES + 1))
    with pytest.raises(UnsupportedError, match="got more than 1048576 bytes"):
        recipe.read(tmp_path / "long")
    (tmp_path / "good").write_text("attn = Q8_0\n")
    read = recipe.read(tmp_path / "good")
    assert (read.name, read.text, len(read.sha256)) == ("good", "attn = Q8_0\n", 64)


def test_every_type_of_a_recipe_is_one_of_ggmls() -> None:
    for name in recipe.TYPES:
        assert GGMLQuantizationType[name] in GGML_QUANT_SIZES
