"""Tuning: a sample is the model's own layers, and what is found is remembered."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import gguf
import numpy as np
import paper
import pytest
from children import child
from tiny_model import write_model

from hymoe import engine
from hymoe.convert import miniature
from hymoe.convert.convert import ConvertOptions, convert
from hymoe.errors import ModelFileError, OutputError, PlacementError
from hymoe.runtime import layout, quiet, sample, tune
from hymoe.runtime.machine import Machine

MACHINE = Machine(devices=(), ram_total=8 << 30, ram_usable=4 << 30, n_core=2, n_fast_core=2, bandwidth=1e10)
# two threads that wait for each other take minutes where others use the processor too
LONE = replace(MACHINE, n_core=1, n_fast_core=1)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model.gguf", words=2000)


def test_a_sample_is_the_models_own_weights(model: Path, tmp_path: Path) -> None:
    ours = gguf.GGUFReader(sample.write(model, tmp_path / "sample.gguf"))
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(model).tensors}
    assert sorted(theirs) == sorted(tensor.name for tensor in ours.tensors)
    for tensor in ours.tensors:
        kept = sample.N_VOCAB if tensor.name in ("token_embd.weight", "output.weight") else None
        assert tensor.tensor_type == theirs[tensor.name].tensor_type
        assert np.array_equal(tensor.data, theirs[tensor.name].data[:kept]), tensor.name


def test_a_sample_of_a_split_model(mini: Path, tmp_path: Path) -> None:
    convert(ConvertOptions(mini, tmp_path / "mini.gguf", split_max_bytes=1 << 20))
    first = next(tmp_path.glob("mini-00001-of-*.gguf"))
    ours = gguf.GGUFReader(sample.write(first, tmp_path / "sample.gguf"))
    theirs = {t.name: t for part in sorted(tmp_path.glob("mini-0*.gguf")) for t in gguf.GGUFReader(part).tensors}
    chosen = sample.layers(layout.read(first))
    assert len(chosen) == 2 < miniature.Spec().n_layer
    for tensor in ours.tensors:
        name = tensor.name
        if name.startswith("blk."):
            _, place, rest = name.split(".", 2)
            name = f"blk.{chosen[int(place)]}.{rest}"
        assert np.array_equal(tensor.data, theirs[name].data[: sample.N_VOCAB]), tensor.name


def test_layers_of_both_sizes_are_chosen(tmp_path: Path) -> None:
    shape = replace(paper.A13B, n_layer=5, n_expert=8)
    about = layout.read(paper.write(tmp_path / "paper.gguf", shape))
    small, large = sorted(sample.layers(about), key=lambda layer: about.layers[layer].experts)
    sizes = [layer.experts for layer in about.layers]
    assert (about.layers[small].experts, about.layers[large].experts) == (min(sizes), max(sizes))
    assert min(sizes) < max(sizes)


def test_layers_that_share_stay_together(tmp_path: Path) -> None:
    about = layout.read(paper.write(tmp_path / "paper.gguf", replace(paper.LARGE, n_layer=4, n_expert=2)))
    assert sample.layers(about) == [0, 1]


def test_candidates() -> None:
    assert tune.candidates(MACHINE) == (1, 2)
    assert tune.candidates(replace(MACHINE, n_core=16, n_fast_core=8)) == (4, 8, 16)
    assert tune.candidates(replace(MACHINE, n_core=1, n_fast_core=1)) == (1,)


@pytest.mark.engine
def test_what_is_found_is_remembered(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYMOE_ENGINE", str(engine.find().bin))
    monkeypatch.setenv("HYMOE_CACHE", str(tmp_path / "cache"))
    for name, size in {"UBATCHES": (64, 128), "N_PROMPT": 64, "N_ANSWER": 4, "N_DEPTH": 64}.items():
        monkeypatch.setattr(tune, name, size)
    assert tune.known(model, LONE) is None
    found = tune.tune(model, LONE)
    assert {found.threads, found.threads_batch} <= set(tune.candidates(LONE))
    assert found.ubatch in tune.UBATCHES
    assert found.stored
    assert found.repacked
    kept = list((tmp_path / "cache" / "measured").iterdir())
    assert [file.suffix for file in kept] == [".json"], "the sample is gone"
    assert tune.known(model, LONE) == found
    # another file of the same kind is the same to it, another processor is not
    assert tune.known(write_model(tmp_path / "other.gguf", words=2000), LONE) == found
    assert tune.known(model, replace(LONE, n_core=3)) is None


# repacked?: tokens/s of prompts and answers
SPEEDS = {0: (300.0, 30.0), 1: (200.0, 33.0)}


def rows(_file: Path, options: tune.Options, _tick: object) -> list[tune.Row]:
    """As llama-bench, on a processor that likes weights as stored and ubatches of 1024 tokens."""
    found: list[tune.Row] = []
    for values in product(*options.values()):
        chosen = dict(zip(options, values, strict=True))
        n_ubatch = chosen.get("ubatch-size", 512)
        row = {"repack": chosen["repack"], "n_threads": chosen["threads"], "n_ubatch": n_ubatch}
        row |= {"flash_attn": chosen.get("flash-attn", 1)}
        reading, writing = (speed * chosen["threads"] / MACHINE.n_core for speed in SPEEDS[chosen["repack"]])
        reading *= 1.2 if n_ubatch == 1024 else 1.0
        if chosen["n-prompt"]:
            found.append({**row, "n_prompt": chosen["n-prompt"], "n_gen": 0, "samples_ts": [0.9 * reading, reading]})
        if chosen["n-gen"]:
            found.append({**row, "n_prompt": 0, "n_gen": chosen["n-gen"], "samples_ts": [writing, 0.9 * writing]})
    return found


@pytest.mark.engine
def test_rates_are_what_was_done_with_the_models_weights(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HYMOE_ENGINE", str(engine.find().bin))
    monkeypatch.setenv("HYMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tune, "_rows", rows)
    monkeypatch.setattr(quiet.Watch, "busy", lambda _watch: True)
    found = tune.tune(model, MACHINE)
    assert "tune again when nothing else runs" in capsys.readouterr().err
    assert (found.repack, found.threads, found.threads_batch, found.ubatch) == (False, 2, 2, 1024)
    about = layout.read(model)
    chosen = sample.layers(about)
    used = about.shape.n_expert_used / about.shape.n_expert
    share = {t: used if t.role is layout.Role.EXPERTS else 1.0 for t in about.tensors if t.layer in chosen}
    n_bytes = sum(part * t.n_bytes for t, part in share.items())
    # past its attention the last layer works for one token
    kept = [t for t in share if t.layer != chosen[-1] or t.role is layout.Role.ATTENTION]
    n_params = sum(share[t] * t.n_params for t in kept)
    assert found.stored
    assert found.stored.read == pytest.approx(30 * n_bytes)
    assert found.stored.ops == pytest.approx(1.2 * 300 * 2 * n_params)
    assert found.repacked
    assert found.repacked.read == pytest.approx(33 * n_bytes)
    assert found.repacked.ops == pytest.approx(200 * 2 * n_params)


@pytest.mark.engine
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_leaves_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.setenv("HYMOE_ENGINE", str(engine.find().bin))
    monkeypatch.setenv("HYMOE_CACHE", str(tmp_path / "cache"))
    script = (
        "import sys; from pathlib import Path; from hymoe.runtime import machine, tune\n"
        f"tune.tune(Path(sys.argv[1]), machine.Machine.from_json({LONE.to_json()!r}))"
    )
    with child([sys.executable, "-c", script, model], stderr=subprocess.PIPE) as tuning:
        measured = tmp_path / "cache" / "measured"
        deadline = time.monotonic() + 120
        while not list(measured.glob("sample-*/sample.gguf")) and time.monotonic() < deadline:
            time.sleep(0.02)
        tuning.send_signal(number)
        tuning.communicate(timeout=120)
    assert tuning.returncode == (-number if number == signal.SIGINT else 128 + number)
    assert list(measured.iterdir()) == []


def test_what_a_killed_process_left_goes_a_day_later(model: Path, tmp_path: Path) -> None:
    for name, age in (("sample-old", 2 * sample.LEFT_SECONDS), ("sample-new", 0)):
        (tmp_path / "cache" / name).mkdir(parents=True)
        (tmp_path / "cache" / name / "sample.gguf").write_bytes(b"weights")
        then = time.time() - age
        os.utime(tmp_path / "cache" / name, (then, then))
    with sample.sample(model, tmp_path / "cache"):
        assert not (tmp_path / "cache" / "sample-old").exists()
        assert (tmp_path / "cache" / "sample-new").exists()


def test_what_cannot_be_tuned(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYMOE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(PlacementError, match="do not fit into RAM"):
        tune.tune(model, replace(MACHINE, ram_usable=1000))
    with pytest.raises(PlacementError, match="needs the weights"):
        tune.tune(paper.write(tmp_path / "paper.gguf", replace(paper.A13B, n_layer=2)), MACHINE)
    with pytest.raises(ModelFileError, match="no such file"):
        tune.tune(tmp_path / "absent.gguf", MACHINE)
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(OutputError, match="cannot write there"), sample.sample(model, tmp_path / "cache"):
        pass
