"""`hy-imatrix recipe` from a model to a file that hy-convert makes of it, and everything that can be wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from tiny_recipe_model import write_imatrix

from hymoe.convert.cli import main as convert
from hymoe.engine.bindings import quantize_rows
from hymoe.imatrix.cli import main
from hymoe.imatrix.recommend import MENU
from hymoe.imatrix.weights import GgufWeights

pytestmark = pytest.mark.engine


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of measurements of this test's own, with the engine of the usual one."""
    from hymoe.engine.installed import find

    assert gguf.is_file()
    monkeypatch.setenv("HYMOE_ENGINE", str(find().bin))
    monkeypatch.setenv("HYMOE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "recipes"


def run(*arguments: object) -> int:
    return main(["recipe", "--threads", "1", *map(str, arguments)])


@pytest.fixture
def short_text(tmp_path: Path) -> Path:
    """Enough to measure on, in half a second."""
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"The boat number {i} left the harbour at dawn, and came back." for i in range(16)))
    return path


def test_a_recipe_becomes_a_file_of_its_size(
    mini_checkpoint: Path, gguf: Path, imatrix: Path, short_text: Path, tmp_path: Path
) -> None:
    out, recipe = tmp_path / "out.gguf", tmp_path / "recipe"
    size = int(0.3 * gguf.stat().st_size)
    assert run(gguf, "--imatrix", imatrix, "--size", size, "--text", short_text, "-o", recipe) == 0
    command = ["--quant", "Q4_K_M", "--imatrix", str(imatrix), "--recipe", str(recipe)]
    assert convert([str(mini_checkpoint), str(out), *command]) == 0
    assert size * 0.99 < out.stat().st_size < size * 1.005
    text = recipe.read_text()
    said = re.search(r"BF16.gguf: ([\d.]+) bits per weight", text)
    with GgufWeights(out) as weights:
        assert said
        assert float(said[1]) == pytest.approx(weights.bits_per_weight, abs=0.001)
    require_searched_embeddings(gguf, out)
    assert "Predicted loss" in text
    assert "measured by running this model" in text
    assert len(re.findall(r"^# +[\d.]+ [KM]B +[\d.]+ bits  loss", text, re.MULTILINE)) == 5


def require_searched_embeddings(gguf: Path, out: Path) -> None:
    """No imatrix has them; with a recipe they are quantized as if all columns counted alike."""
    name = "token_embd.weight"
    with GgufWeights(gguf) as weights, GgufWeights(out) as made:
        rows = range(weights.tensors[name].n_rows)
        ones = np.ones(weights.tensors[name].shape[-1], np.float32)
        expected = quantize_rows(weights.rows(name, 0, rows), made.tensors[name].qtype, importance=ones)
        np.testing.assert_array_equal(made.stored(name, 0, rows), expected)


def test_another_size_measures_nothing_again(
    gguf: Path, imatrix: Path, short_text: Path, tmp_path: Path, cache: Path
) -> None:
    common = (gguf, "--imatrix", imatrix, "--text", short_text)
    assert run(*common, "--bpw", 4.5, "-o", tmp_path / "a") == 0
    kept = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert len(kept) == 2
    assert run(*common, "--bpw", 3.5, "-o", tmp_path / "b") == 0
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == kept
    # nor is what was kept ignored
    for path in kept:
        found = json.loads(path.read_text())
        first = next(iter(found))
        if isinstance(found[first], float):
            path.write_text(json.dumps(dict.fromkeys(found, 0.0) | {"blk.1.attn_k.weight": 1.0}))
    assert run(*common, "--bpw", 3.5, "-o", tmp_path / "c") == 0
    assert r"blk\.(1)\.attn_k\.weight$ = Q8_0" in (tmp_path / "c").read_text()


def test_a_menu_is_kept(gguf: Path, short_text: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(gguf, "--bpw", 4.2, "--text", short_text, "--menu", "q6_k,Q3_K") == 0
    types = set(re.findall(r"\$ = (\w+)", capfd.readouterr().out))
    assert types == {"Q6_K", "Q3_K"}


def test_a_cache_that_cannot_be_written(
    gguf: Path, short_text: Path, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cache.parent.mkdir()
    cache.touch()
    assert run(gguf, "--bpw", 5, "--no-measure", "--text", short_text) == 0
    out, err = capfd.readouterr()
    assert "Predicted loss" in out
    assert "not kept for the next time (" in err


def test_a_checkpoint_without_weights_and_one_with(
    mini_checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((mini_checkpoint / "config.json").read_bytes())
    for folder in (bare, mini_checkpoint):
        assert run(folder, "--bpw", 4.5) == 0
        assert "assumed from those of hymoe's miniature" in capfd.readouterr().out
    assert run(mini_checkpoint, "--bpw", 4.5, "--measure") == 1
    assert "sensitivities: got a checkpoint folder; convert it to BF16 or Q8_0" in capfd.readouterr().err


def test_a_budget_that_cannot_be_met_says_the_smallest_that_can(
    gguf: Path, imatrix: Path, short_text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    common = (gguf, "--imatrix", imatrix, "--text", short_text, "-o", tmp_path / "out")
    for option, wanted, least in (("--size", "100K", r"at least (\d+) bytes"), ("--bpw", "1.0", r"at least ([\d.]+)")):
        assert run(*common, option, wanted) == 1
        said = re.search(rf"^error: {option}: got .*, expected {least}$", capfd.readouterr().err, re.MULTILINE)
        assert said
        assert not (tmp_path / "out").exists()
        assert run(*common, option, said[1]) == 0
        (tmp_path / "out").unlink()


BAD = {
    "no budget": ((), 2, "give one of --fit, --size and --bpw"),
    "two budgets": (("--bpw", "4", "--size", "4M"), 2, "give one of"),
    "half a fit": (("--fit", "24G"), 2, "is no pair of memories"),
    "a type nobody has": (("--bpw", "4", "--menu", "Q4_K_M"), 2, "'Q4_K_M': give one of Q8_0"),
    "memory without one": (("--bpw", "4", "--kv", "Q8_0"), 2, "for --kv: is for --fit"),
    "a speed that does not count": (
        ("--fit", "24G+64G", "--no-speed", "--min-speed", "9"),
        2,
        "is nothing with --no-s",
    ),
    "no such model": (("--bpw", "4"), 1, "none.gguf: no such file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_usage(name: str, gguf: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments, status, says = BAD[name]
    model = tmp_path / "none.gguf" if name == "no such model" else gguf
    assert run(model, *arguments) == status
    assert says in " ".join(capfd.readouterr().err.replace("│", " ").split())


def test_files_of_something_else(
    gguf: Path, tmp_path: Path, mini_checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with GgufWeights(gguf) as weights:
        other = write_imatrix(tmp_path / "other.gguf", weights, also="blk.9.attn_q.weight")
    assert run(gguf, "--bpw", 4, "--imatrix", other) == 1
    assert "error: other.gguf: the importance matrix of another model: got an entry for blk.9.attn_q" in (
        capfd.readouterr().err
    )
    small = tmp_path / "small.gguf"
    assert convert([str(mini_checkpoint), str(small), "--quant", "Q4_K_M", "-q"]) == 0
    assert run(small, "--bpw", 4) == 1
    assert "small.gguf: token_embd.weight: a model to measure: got Q6_K, expected one of F32" in capfd.readouterr().err
    assert run(other, "--bpw", 4) == 1
    assert "other.gguf: architecture: got none, expected hunyuan-moe" in capfd.readouterr().err
    (tmp_path / "there").touch()
    assert run(gguf, "--bpw", 4, "-o", tmp_path / "there") == 1
    assert "there exists; pass --overwrite" in capfd.readouterr().err
    (tmp_path / "cut.gguf").write_bytes(gguf.read_bytes()[:-100])
    assert run(tmp_path / "cut.gguf", "--bpw", 4) == 1
    assert "cut.gguf: truncated" in capfd.readouterr().err


def damaged(source: Path, out: Path, name: str) -> Path:
    """Copy a GGUF with a NaN in the middle of a tensor."""
    raw = bytearray(source.read_bytes())
    tensor = next(tensor for tensor in GGUFReader(source).tensors if tensor.name == name)
    at = tensor.data_offset + 2 * (tensor.n_elements // 2)
    raw[at : at + 2] = b"\xc0\x7f"
    out.write_bytes(raw)
    return out


def test_weights_that_are_no_numbers(gguf: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bad = damaged(gguf, tmp_path / "nan.gguf", "blk.0.attn_k.weight")
    assert run(bad, "--bpw", 4) == 1
    assert "nan.gguf" in (said := capfd.readouterr().err)
    assert said.startswith("error: ")
    assert said.count("\n") == 1


@pytest.mark.data
def test_speed_in_ram_counts(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Types that this processor computes slowly are left where a speed is asked for, at some loss."""
    speeds = dict.fromkeys(("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K"), 20000000000.0)
    speeds |= dict.fromkeys(("IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS"), 4000000000.0)
    table = tmp_path / "speeds.json"
    table.write_text(json.dumps(speeds))
    common = (data / "a13b", "--fit", "24G+32G", "--speed-table", table, "--menu", ",".join(speeds))
    assert run(*common, "--min-speed", 1000) == 1
    most = re.search(r"got 1000.0, expected at most ([\d.]+) tokens per second", capfd.readouterr().err)
    assert most
    found = []
    for wish in (("--min-speed", 0.01), ("--min-speed", 1.9)):
        assert run(*common, *wish) == 0
        text = capfd.readouterr().out
        speed, loss = re.search(r"give ([\d.]+) tokens", text), re.search(r"loss: ([\d.e-]+) nats", text)
        assert speed
        assert loss
        found.append((float(speed[1]), float(loss[1]), len(re.findall(r"exps\S+ = IQ", text))))
    (slow, least, many), (fast, more, few) = found
    assert fast < float(most[1])
    assert slow < 1.9 <= fast
    assert least < more
    assert few < many


@pytest.mark.data
def test_speed_is_measured_where_nobody_says(
    data: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once per processor, in the shape of the model's experts."""
    monkeypatch.setattr("hymoe.engine.type_speed.SECONDS", 0.01)
    common = (data / "a13b", "--fit", "24G+64G", "--menu", "Q8_0,Q4_K,Q2_K")
    assert run(*common, "-o", tmp_path / "a") == 0
    assert "The experts in RAM alone would give" in (tmp_path / "a").read_text()
    (kept,) = cache.iterdir()
    speeds = json.loads(kept.read_text())
    assert set(speeds) == set(MENU)
    assert all(1e6 < speed < 1e13 for speed in speeds.values())


FITS = ("24G+32G", "24G+64G", "24G+96G", "16G+64G", "12G+48G")


@pytest.mark.data
@pytest.mark.parametrize("ctx", [32768, 131072])
@pytest.mark.parametrize("fit", FITS)
def test_recipes_for_the_real_config_fit_the_machine(
    fit: str, ctx: int, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """What is chosen is placed by hy-plan's own arithmetic; where nothing fits, what is said to fit does."""
    recipe = tmp_path / "recipe"
    status = run(data / "a13b", "--fit", fit, "--ctx", ctx, "-o", recipe, "--no-speed")
    if status:
        said = capfd.readouterr().err
        found = re.search(r"expected --fit (\d+G\+\d+G)", said)
        assert found, said
        fit = found[1]
        assert run(data / "a13b", "--fit", fit, "--ctx", ctx, "-o", recipe, "--no-speed") == 0
    require_place(data / "a13b", recipe, fit, ctx)


def require_place(model: Path, recipe: Path, fit: str, ctx: int) -> None:
    layouts = pytest.importorskip("hymoe.runtime.layout")
    from hymoe.convert.convert import preview
    from hymoe.imatrix.budget import parse_fit

    plans, planned = pytest.importorskip("hymoe.runtime.plan"), pytest.importorskip("hymoe.runtime.planned")
    machines = pytest.importorskip("hymoe.runtime.machine")
    made = preview(model, "Q4_K_M", recipe=recipe)
    keys = {key.key: key.value for key in made.keys if key.kind != "ARRAY"}
    table = [layouts.Entry(tensor.name, tensor.shape, tensor.qtype.name) for tensor in made.plan.tensors]
    layout = layouts.of(model.name, made.arch.name, keys, table)
    card, ram = parse_fit(fit)
    machine = machines.Machine.paper(vram=[card], ram=ram)
    plan = plans.make(layout, machine, planned.Wish(n_ctx=ctx))
    assert all(memory.free >= 0 for memory in plan.memories)


def test_a_head_with_an_array_is_read(tmp_path: Path) -> None:
    """Arrays of numbers and of texts before what is wanted, and keys of another architecture."""
    path = tmp_path / "x.gguf"
    writer = GGUFWriter(path, "hunyuan-moe")
    writer.add_array("some.numbers", [1, 2, 3])
    writer.add_array("some.texts", ["a", "bc"])
    writer.add_uint32("hunyuan-moe.block_count", 7)
    writer.add_uint32("other.block_count", 8)
    writer.add_tensor("a.weight", np.arange(64, dtype=np.float32).reshape(2, 32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GgufWeights(path) as weights:
        assert weights.hparams == {"block_count": 7}
        np.testing.assert_array_equal(weights.rows("a.weight", 0, range(1, 2)), [np.arange(32, 64)])
