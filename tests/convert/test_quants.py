"""--quant: types and bytes are those of llama-quantize; imatrix and recipe mean what they mean there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader

from hymoe.convert import miniature, pieces
from hymoe.convert.cli import main
from hymoe.convert.convert import ConvertOptions, convert, prepare
from hymoe.convert.miniature import Spec
from hymoe.convert.quants import Quant
from hymoe.engine import bindings, find
from hymoe.imatrix import files
from hymoe.imatrix.files import Entry, Imatrix

pytestmark = pytest.mark.engine

# Sixteen layers: the rules divide by eight, and treat the first two and the last two otherwise.
SMALL = Spec(n_layer=16, n_expert=5, n_expert_used=2, n_rank=300)
TWELVE = Spec(n_layer=16, n_expert=12, n_expert_used=3, n_rank=300)
FALLBACK = Spec(n_layer=8, n_expert=3, n_expert_used=2, n_rank=300, n_ff=128 * 3)
SHAPES = {
    "small": SMALL,
    "eight experts, four heads per key": Spec(n_layer=16, n_expert=8, n_expert_used=2, n_rank=300, n_head_kv=1),
    "untied, nineteen layers": Spec(n_layer=19, n_expert=2, n_expert_used=2, n_rank=300, tied=False),
    "one layer, narrow rows": Spec(n_layer=1, n_expert=2, n_expert_used=2, n_rank=300, n_embd=160, n_ff=96),
    "fallback": FALLBACK,
}
FEW = [("Q4_K_M", False), ("Q3_K_M", False), ("IQ4_XS", True), ("MXFP4_MOE", False)]
EMPTY_EXPERT = 1


class Model(NamedTuple):
    """A checkpoint, its BF16 GGUF, and an imatrix for it in which one expert of each stack met no token."""

    folder: Path
    gguf: Path
    imatrix: Path


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Spec], Model]:
    made: dict[Spec, Model] = {}

    def make(spec: Spec) -> Model:
        if spec not in made:
            folder = tmp_path_factory.mktemp("model")
            model = Model(miniature.write(folder / "in", spec), folder / "bf16.gguf", folder / "imatrix.gguf")
            convert(ConvertOptions(model.folder, model.gguf))
            files.write(model.imatrix, random_imatrix(model.gguf))
            made[spec] = model
        return made[spec]

    return make


@pytest.fixture
def small(model_of: Callable[[Spec], Model]) -> Model:
    return model_of(SMALL)


def random_imatrix(gguf: Path) -> Imatrix:
    rng = np.random.default_rng(3)
    entries = {}
    for tensor in GGUFReader(gguf).tensors:
        if tensor.name.startswith("blk.") and len(tensor.shape) > 1:
            n_slice, n_per_row = (int(tensor.shape[2]) if len(tensor.shape) > 2 else 1), int(tensor.shape[0])
            counts = rng.integers(1, 900, n_slice)
            if n_slice > 1:
                counts[EMPTY_EXPERT] = 0
            sums = rng.exponential(1, (n_slice, n_per_row)) * counts[:, None]
            entries[tensor.name] = Entry(sums.astype(np.float32).reshape(-1), counts)
    return Imatrix("random", entries, ("a.txt", "b.txt"), n_chunks=7, chunk_size=512)


def stock(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [find().tool("llama-quantize"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, timeout=600)


def stock_types(gguf: Path, quant: str, *options: str | Path) -> tuple[dict[str, str], bool]:
    """Ask llama-quantize --dry-run for every tensor's type, and whether it would refuse for want of an imatrix."""
    done = stock("--dry-run", *options, gguf, quant)
    assert done.returncode == 0, done.stderr
    text = done.stdout + done.stderr
    line = re.compile(r"^\[ *\d+/ *\d+\] (\S+) .*type = +(\w+), size =.*?(?:\((\w+)\))?$", re.MULTILINE)
    return {name: (to or was).upper() for name, was, to in line.findall(text)}, "will require an imatrix!" in text


def our_types(model: Model, quant: str, imatrix: Path | None = None, recipe: Path | None = None) -> dict[str, str]:
    plan = prepare(model.folder, quant, imatrix, recipe).plan
    return {tensor.name: tensor.qtype.name for tensor in plan.tensors}


def tensors(gguf: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in GGUFReader(gguf).tensors}


def assert_same(ours: Path, theirs: Path) -> None:
    got, want = tensors(ours), tensors(theirs)
    assert sorted(got) == sorted(want)
    for name, tensor in want.items():
        assert got[name].tensor_type == tensor.tensor_type, name
        assert np.array_equal(got[name].data, tensor.data), name


def errors_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


# --- types -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("imatrix", [False, True], ids=["without", "with"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_type_is_what_llama_quantize_chooses_or_refuses(
    shape: str, imatrix: bool, model_of: Callable[[Spec], Model], capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_of(SHAPES[shape])
    options = ("--imatrix", model.imatrix) if imatrix else ()
    refused = []
    for quant in Quant:
        want, is_refused = stock_types(model.gguf, quant.value, *options)
        if is_refused:
            refused.append(quant.value)
            arguments = [str(model.folder), "x.gguf", "--quant", quant.value, "--dry-run"]
            assert main(arguments) == 1
            error = errors_of(capsys)[-1]
            assert re.search(rf"^error: --quant {quant.value}: blk\.0\.\S+ as \w+ needs importance data; make", error)
        else:
            assert our_types(model, quant.value, model.imatrix if imatrix else None) == want, quant
    if shape == "small":
        nine = ["IQ3_XS", "IQ3_XXS", "Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"]
        assert refused == ([] if imatrix else nine)


def test_the_refusal_is_real(small: Model, tmp_path: Path) -> None:
    assert stock(small.gguf, tmp_path / "stock.gguf", "IQ2_XS").returncode == 1
    assert main([str(small.folder), str(tmp_path / "ours.gguf"), "--quant", "IQ2_XS"]) == 1
    assert not (tmp_path / "ours.gguf").exists()


def test_fallback_types_are_counted(model_of: Callable[[Spec], Model], capsys: pytest.CaptureFixture[str]) -> None:
    types = our_types(model_of(FALLBACK), "Q4_K_M")
    assert types["blk.0.ffn_down_exps.weight"] == "Q8_0"
    assert types["blk.0.ffn_up_exps.weight"] == "Q4_K"
    assert errors_of(capsys) == [
        "warning: 16 of 81 matrices have rows that do not fill the blocks of the wanted type: they get the types that "
        "llama.cpp falls back to (--dry-run lists them)"
    ]


# --- bytes -------------------------------------------------------------------------------------------------------


@pytest.fixture
def many_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut every matrix: 48 rows of 256, which divides neither an expert nor ggml's own portions."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 48 * 256 * 4)


def check_bytes(model: Model, quant: str, imatrix: bool, folder: Path) -> Path:
    ours, theirs = folder / "ours.gguf", folder / "theirs.gguf"
    options = ("--imatrix", model.imatrix) if imatrix else ()
    done = stock(*options, model.gguf, theirs, quant, "2")
    assert done.returncode == 0, done.stderr
    convert(ConvertOptions(model.folder, ours, quant, imatrix=model.imatrix if imatrix else None))
    assert_same(ours, theirs)
    got, want = keys(ours), keys(theirs)
    assert got.pop("quantize.imatrix.file", None) == (model.imatrix.name if imatrix else None)
    want.pop("quantize.imatrix.file", None)
    assert ("hymoe.imatrix.sha256" in got) == imatrix
    got.pop("hymoe.imatrix.sha256", None)
    assert got == want
    theirs.unlink()
    return ours


def keys(gguf: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(gguf).fields.items() if not name.startswith("GGUF.")}


@pytest.mark.usefixtures("many_pieces")
@pytest.mark.parametrize(("quant", "imatrix"), FEW)
def test_bytes_are_those_of_llama_quantize(quant: str, imatrix: bool, small: Model, tmp_path: Path) -> None:
    check_bytes(small, quant, imatrix, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("imatrix", [False, True], ids=["without", "with"])
@pytest.mark.parametrize("quant", Quant)
def test_bytes_of_every_type(
    quant: Quant, imatrix: bool, model_of: Callable[[Spec], Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(TWELVE)
    if not imatrix and stock_types(model.gguf, quant.value)[1]:
        assert stock(model.gguf, tmp_path / "stock.gguf", quant.value, "2").returncode == 1
        assert main([str(model.folder), str(tmp_path / "ours.gguf"), "--quant", quant.value]) == 1
        return
    monkeypatch.setattr(pieces, "PIECE_BYTES", 80 * 256 * 4)
    check_bytes(model, quant.value, imatrix, tmp_path)


@pytest.mark.parametrize("quant", ["Q4_K_M", "IQ4_XS"])
def test_bytes_of_fallback_types(quant: str, model_of: Callable[[Spec], Model], tmp_path: Path) -> None:
    check_bytes(model_of(FALLBACK), quant, True, tmp_path)


def test_the_engine_runs_what_was_written(small: Model, tmp_path: Path) -> None:
    ours = check_bytes(small, "Q3_K_M", True, tmp_path)
    command: list[str | Path] = [
        find().tool("llama-bench"),
        "-m",
        ours,
        "-p",
        "32",
        "-n",
        "4",
        "-r",
        "1",
        "-t",
        "2",
        "-o",
        "json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert {row["model_type"] for row in json.loads(done.stdout)} == {"hunyuan-moe ?B Q3_K - Medium"}


@pytest.mark.parametrize("qtype", ["IQ3_S", "IQ2_S", "Q6_K", "Q8_0"])
def test_values_that_no_scale_holds_are_an_error_and_no_abort(qtype: str) -> None:
    ones = np.ones((2, 256), np.float32)
    for weights, importance in ((ones * 1e20, ones[0]), (-ones * 1e12, ones[0]), (ones * 1e9, ones[0] * 1e30)):
        with pytest.raises(FloatingPointError, match=f"^{qtype} cannot hold values of up to 1e"):
            bindings.quantize_rows(weights, GGMLQuantizationType[qtype], importance=importance)


def test_weights_too_large_for_a_type_name_the_tensor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = miniature.write(tmp_path / "in", Spec(n_layer=1, n_expert=2, n_expert_used=2, n_rank=300, dtype="F32"))
    shard = folder / "model.safetensors"
    raw = bytearray(shard.read_bytes())
    n = int.from_bytes(raw[:8], "little")
    begin = 8 + n + json.loads(raw[8 : 8 + n])["model.layers.0.self_attn.o_proj.weight"]["data_offsets"][0]
    raw[begin + 12 : begin + 16] = np.float32(1e15).tobytes()
    shard.write_bytes(raw)
    assert main([str(folder), str(tmp_path / "out.gguf"), "--quant", "IQ3_S"]) == 1
    error = errors_of(capsys)[-1]
    assert error.startswith("error: model.layers.0.self_attn.o_proj.weight (model.safetensors) as IQ3_S: got")
    assert error.endswith("choose --quant BF16")
    assert list(tmp_path.iterdir()) == [folder]


# --- imatrix -----------------------------------------------------------------------------------------------------


def changed(model: Model, to: Path, change: Callable[[dict[str, Entry]], None]) -> Path:
    imatrix = files.read(model.imatrix)
    entries = dict(imatrix.entries)
    change(entries)
    files.write(to, Imatrix("changed", entries, imatrix.datasets, imatrix.n_chunks, imatrix.chunk_size))
    return to


def test_experts_without_data_are_counted_in_one_warning(small: Model, capsys: pytest.CaptureFixture[str]) -> None:
    our_types(small, "Q4_K_M", small.imatrix)
    n_slices = 16 * (3 * SMALL.n_expert + 7)
    assert errors_of(capsys) == [
        f"warning: imatrix.gguf: {16 * 3} of {n_slices} experts' and other matrices met no token: all their columns "
        "count the same (hy-imatrix can repair that)"
    ]


def other_models() -> Iterator[tuple[str, Callable[[dict[str, Entry]], None], str]]:
    wide = Entry(np.ones(512, np.float32), np.array([3]))

    def rename(entries: dict[str, Entry]) -> None:
        for name in list(entries):
            entries[f"enc.{name}"] = entries.pop(name)

    yield (
        "wider",
        lambda entries: entries.update({"blk.3.attn_q.weight": wide}),
        "got 512 values for blk.3.attn_q.weight, expected 256 = 1 × 256",
    )
    yield (
        "fewer experts",
        lambda entries: entries.update({"blk.0.ffn_up_exps.weight": wide}),
        "got 512 values for blk.0.ffn_up_exps.weight, expected 1280 = 5 × 256",
    )
    yield (
        "more layers",
        lambda entries: entries.update({"blk.16.attn_q.weight": wide}),
        "got an entry for blk.16.attn_q.weight, expected the tensors of this one",
    )
    yield "another family", rename, "got no entry for any tensor of this one"


@pytest.mark.parametrize(("change", "says"), [case[1:] for case in other_models()], ids=[c[0] for c in other_models()])
def test_imatrix_of_another_model(
    change: Callable[[dict[str, Entry]], None],
    says: str,
    small: Model,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    imatrix = changed(small, tmp_path / "other.gguf", change)
    out = tmp_path / "out.gguf"
    assert main([str(small.folder), str(out), "--quant", "Q4_K_M", "--imatrix", str(imatrix)]) == 1
    assert errors_of(capsys) == [f"error: other.gguf: the importance matrix of another model: {says}"]
    assert not out.exists()


def test_an_entry_that_is_missing_matters_where_the_type_needs_it(
    small: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    imatrix = changed(small, tmp_path / "holes.gguf", lambda entries: entries.__delitem__("blk.0.ffn_up_exps.weight"))
    assert our_types(small, "Q4_K_M", imatrix) == our_types(small, "Q4_K_M", small.imatrix)
    assert "warning: holes.gguf: no entry for 1 matrices, such as blk.0.ffn_up_exps.weight: quantized without" in (
        errors_of(capsys)
    )
    assert main([str(small.folder), "--dry-run", "--quant", "IQ2_XXS", "--imatrix", str(imatrix)]) == 1
    assert errors_of(capsys) == [
        "error: --quant IQ2_XXS: blk.0.ffn_up_exps.weight as IQ2_XXS needs importance data: got no entry for it in "
        "holes.gguf; collect the imatrix again"
    ]
    assert stock("--imatrix", imatrix, small.gguf, tmp_path / "stock.gguf", "IQ2_XXS").returncode == 1


# --- recipe ------------------------------------------------------------------------------------------------------

RECIPE = """# attention first
attn_(q|k|v)\\.weight = q8_0
blk\\.(0|1)\\.ffn_down_exps = Q6_K
ffn_down_exps = IQ4_NL   # the others
token_embd=Q5_K
"""


def test_a_recipe_is_llama_quantizes_tensor_type_file(small: Model, tmp_path: Path) -> None:
    recipe, stocks = tmp_path / "recipe.txt", tmp_path / "types.txt"
    recipe.write_text(RECIPE)
    lines = (line.split("#")[0].replace(" ", "") for line in RECIPE.splitlines())
    stocks.write_text("\n".join(line for line in lines if line))
    for quant in ("Q4_K_M", "Q3_K_M", "IQ4_XS", "Q8_0"):
        want, _ = stock_types(small.gguf, quant, "--tensor-type-file", stocks)
        assert our_types(small, quant, recipe=recipe) == want, quant
    out = tmp_path / "out.gguf"
    convert(ConvertOptions(small.folder, out, "Q3_K_M", recipe=recipe))
    written = keys(out)
    assert written["hymoe.recipe.text"] == RECIPE
    assert written["hymoe.recipe.file"] == "recipe.txt"
    assert len(written["hymoe.recipe.sha256"]) == 64


def test_a_recipe_works_on_plain_types_too(small: Model, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.txt"
    recipe.write_text("ffn_.*_exps = MXFP4\nattn_v = F32\n")
    types = our_types(small, "BF16", recipe=recipe)
    names = ("ffn_up_exps", "attn_v", "attn_q", "attn_norm")
    assert [types[f"blk.2.{name}.weight"] for name in names] == ["MXFP4", "F32", "BF16", "F32"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("attn_q = Q8_0\nffn_dwn = Q4_K\n", "line 2: ffn_dwn = Q4_K: got a pattern that matches no matrix"),
        ("# x\n\nattn_norm = Q8_0", "line 3: attn_norm = Q8_0: got a pattern that matches no matrix"),
        ("ffn_gate_inp = Q8_0", "line 1: ffn_gate_inp = Q8_0: got a pattern that matches no matrix"),
        ("down_exps = Q4_K", "line 1: down_exps = Q4_K: got blk.0.ffn_down_exps.weight: a row of 384 elements is no"),
        ("attn_q = IQ2_XS", "--quant Q4_K_M: blk.0.attn_q.weight as IQ2_XS needs importance data; make one with"),
        ("token_embd = IQ1_S", "--quant Q4_K_M: token_embd.weight as IQ1_S needs importance data; make one with"),
    ],
)
def test_a_recipe_that_does_not_fit(
    text: str,
    says: str,
    model_of: Callable[[Spec], Model],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = tmp_path / "recipe.txt"
    recipe.write_text(text)
    out = tmp_path / "out.gguf"
    folder = str(model_of(FALLBACK).folder)
    assert main([folder, str(out), "--quant", "Q4_K_M", "--recipe", str(recipe)]) == 1
    said = [line for line in errors_of(capsys) if not line.startswith("warning:")]
    assert len(said) == 1
    assert said[0].removeprefix("error: ").removeprefix("recipe.txt, ").startswith(says)
    assert not out.exists()


# --- command -----------------------------------------------------------------------------------------------------


def test_names_are_taken_in_any_case(small: Model, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(small.folder), "--dry-run", "--quant", "q4_k_m"]) == 0
    assert "\nQ4_K_M: " in capsys.readouterr().out


def test_help_lists_the_types(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"One of {', '.join(Quant)}." in said


def test_without_an_engine_plain_types_work_and_others_say_how(small: Model, tmp_path: Path) -> None:
    script = "import sys; from hymoe.convert.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", script, str(small.folder), "--dry-run", "--quant"]

    def run(quant: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": "", "HYMOE_CACHE": str(tmp_path)}
        return subprocess.run([*command, quant], env=environment, capture_output=True, text=True, check=False)

    assert run("BF16").returncode == 0
    refused = run("Q4_K_M")
    assert refused.returncode == 1
    assert refused.stderr == (f"error: no engine in {tmp_path}/engine: nothing is built yet; run `hy-engine build`\n")
