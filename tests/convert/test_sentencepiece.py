"""A derived checkpoint with a SentencePiece tokenizer.model: the engine's tokens are the library's, or a refusal."""

from __future__ import annotations

import io
import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from engine_eval import tokenize
from gguf import GGUFReader
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from hymoe.convert import miniature
from hymoe.convert.cli import main
from hymoe.convert.miniature import Spec
from hymoe.imatrix import calibration

N_PIECES = 1500
SPEC = Spec(n_layer=1)
N_VOCAB = SPEC.n_rank + len(miniature.SPECIAL_TOKENS)
PLAIN: dict[str, Any] = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "control_symbols": ["<|turn|>"],
}


@cache
def lines() -> list[str]:
    return [line for text in calibration.texts() for line in text.content.splitlines() if line.strip()]


def train(**options: Any) -> bytes:
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines()), model_writer=model, vocab_size=N_PIECES, minloglevel=2, **options
    )
    return model.getvalue()


def checkpoint(folder: Path, model: bytes, tokenizer_config: dict[str, Any] | None = None) -> Path:
    """A miniature whose vocabulary is the model's; its end token is the model's </s>."""
    miniature.write(folder, SPEC)
    (folder / "hy.tiktoken").unlink()
    (folder / "tokenizer.model").write_bytes(model)
    for name in ("config.json", "generation_config.json"):
        config = json.loads((folder / name).read_text())
        config |= {"eos_token_id": 2}
        config.pop("eod_token_id", None)
        (folder / name).write_text(json.dumps(config))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | (tokenizer_config or {})))
    return folder


def converted(tmp_path: Path, model: bytes, tokenizer_config: dict[str, Any] | None = None) -> Path:
    folder = checkpoint(tmp_path / "in", model, tokenizer_config)
    assert main([str(folder), str(tmp_path / "out.gguf"), "-q"]) == 0
    return tmp_path / "out.gguf"


def keys(gguf: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(gguf).fields.items() if name.startswith("tokenizer.")}


def strings() -> list[str]:
    rng = random.Random(5)
    found = ["", " ", "a", " a", "a ", "  two  spaces ", "\n", "tab\there", "▁", "🙂 naïve\n\n  café", "中文，标点。"]
    for _ in range(200):
        line = rng.choice(lines())
        begin = rng.randrange(len(line))
        found.append(line[begin : begin + rng.randint(1, 60)])
    for _ in range(200):
        spans = [rng.choice([(0x20, 0x7E), (0xA1, 0x17F), (0x400, 0x4FF), (0x4E00, 0x9FFF), (0x1F600, 0x1F64F)])]
        found.append("".join(chr(rng.randint(*rng.choice(spans))) for _ in range(rng.randint(1, 30))))
    return found


@pytest.mark.engine
@pytest.mark.parametrize(
    "options",
    [
        {"add_dummy_prefix": True},
        {"add_dummy_prefix": False},
        {"add_dummy_prefix": False, "user_defined_symbols": ["<|user|>", "two▁words", "ing"]},
        {"add_dummy_prefix": True, "split_digits": True, "allow_whitespace_only_pieces": True},
    ],
    ids=["prefix", "no prefix", "user defined", "digits and spaces"],
)
def test_tokens_are_the_librarys(options: dict[str, Any], tmp_path: Path) -> None:
    model = train(**PLAIN, **options)
    library = SentencePieceProcessor(model_proto=model)
    texts = strings()
    if "user_defined_symbols" in options:
        texts += [f"{text[:9]}{symbol}{text[9:]}" for text in texts[:99] for symbol in ("<|user|>", "two words", "ing")]
    got = tokenize(converted(tmp_path, model), texts)
    wrong = [(t, want, ids) for t, ids in zip(texts, got, strict=True) if ids != (want := library.encode(t))]
    assert not wrong, f"{len(wrong)} of {len(texts)} differ, the first: {wrong[0]}"
    assert len({token for ids in got for token in ids}) > 300


def test_pieces_scores_and_types(tmp_path: Path) -> None:
    model = train(**PLAIN, user_defined_symbols=["two▁words"], pad_id=3)
    library = SentencePieceProcessor(model_proto=model)
    found = keys(converted(tmp_path, model))
    assert found["tokenizer.ggml.model"] == "llama"
    tokens, types, scores = (found[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type", "scores"))
    assert len(tokens) == len(types) == len(scores) == N_VOCAB
    for i in range(N_PIECES):
        piece = library.id_to_piece(i)
        kind = 2 if library.is_unknown(i) else 3 if library.is_control(i) else 6 if library.is_byte(i) else 1
        if piece == "two▁words":
            piece, kind = "two words", 4
        assert (tokens[i], types[i]) == (piece, kind)
        assert scores[i] == pytest.approx(library.get_score(i))
    assert 4 in types
    assert tokens[N_PIECES:] == [f"[PAD{i + 1}]" for i in range(N_VOCAB - N_PIECES)]
    assert set(types[N_PIECES:]) == {5}
    assert found["tokenizer.ggml.bos_token_id"] == library.bos_id() == 1
    assert found["tokenizer.ggml.eos_token_id"] == library.eos_id() == 2
    assert found["tokenizer.ggml.unknown_token_id"] == library.unk_id() == 0
    assert found["tokenizer.ggml.padding_token_id"] == library.pad_id() == 3
    assert found["tokenizer.ggml.add_space_prefix"] is True
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.ggml.add_eos_token"] is False


def test_added_tokens(tmp_path: Path) -> None:
    added = {
        "2": {"content": "</s>", "special": True},
        str(N_PIECES): {"content": "<|im_end|>", "special": True},
        str(N_PIECES + 1): {"content": "▁plain", "special": False},
    }
    settings = {"added_tokens_decoder": added, "add_bos_token": False, "add_eos_token": True}
    found = keys(converted(tmp_path, train(**PLAIN), settings))
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert tokens[N_PIECES : N_PIECES + 3] == ["<|im_end|>", " plain", "[PAD1]"]
    assert types[N_PIECES : N_PIECES + 3] == [3, 4, 5]
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert found["tokenizer.ggml.add_eos_token"] is True


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unigram": ({"model_type": "unigram"}, "trainer_spec.model_type: got 1"),
    "no byte fallback": ({"byte_fallback": False}, "trainer_spec.byte_fallback"),
    "normalisation": ({"normalization_rule_name": "nmt_nfkc"}, "normalizer_spec.precompiled_charsmap"),
    "fewer spaces": ({"remove_extra_whitespaces": True}, "normalizer_spec.remove_extra_whitespaces"),
    "spaces behind": ({"treat_whitespace_as_suffix": True}, "trainer_spec.treat_whitespace_as_suffix"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options, part = REFUSED[name]
    folder = checkpoint(tmp_path / "in", train(**{**PLAIN, **options}))
    assert main([str(folder), str(tmp_path / "out.gguf")]) == 1
    assert f"tokenizer.model: {part}" in capsys.readouterr().err


@pytest.mark.parametrize("junk", [b"", b"no model", b"\x0a\xff\xff\xff\xff", train(**PLAIN)[:5000]])
def test_broken(junk: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint(tmp_path / "in", junk)
    assert main([str(folder), str(tmp_path / "out.gguf")]) == 1
    assert "error: tokenizer.model: not a SentencePiece model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("added", "part"),
    [
        ({"1502": {"content": "<|x|>"}}, "added token <|x|>: got id 1502, expected at most 1500"),
        ({"one": {"content": "<|x|>"}}, "added_tokens_decoder: one"),
        ({"1500": {"content": 5}}, "added_tokens_decoder: 1500"),
        ({"1500": "<|x|>"}, "1500"),
    ],
)
def test_broken_added_tokens(
    added: dict[str, Any], part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint(tmp_path / "in", train(**PLAIN), {"added_tokens_decoder": added})
    assert main([str(folder), str(tmp_path / "out.gguf")]) == 1
    assert part in capsys.readouterr().err
