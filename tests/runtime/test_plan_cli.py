"""`hy-plan`, the buffers that it measures, and whether the real server takes what it says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import paper
import pytest
from children import child
from large_model import Large
from large_model import write as write_large
from rpc_worker import rpc_worker

from hymoe.convert.convert import ConvertOptions, convert
from hymoe.runtime import buffers, layout, plan_view, process, settle
from hymoe.runtime.machine import Machine, probe
from hymoe.runtime.plan_cli import main
from hymoe.runtime.planned import RAM, Plan, Speeds, Wish
from hymoe.runtime.roofline import Source
from hymoe.sizes import RAM_MARGIN

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("own_cache")]

GIB = 1 << 30
SMALL = replace(paper.A13B, n_layer=6, n_embd=512, n_head=8, n_head_kv=2, head_dim=64, n_ff=512, n_vocab=3000)
# weights of 32 layers that a card holds in part
MACHINES = {
    "a13b": (paper.A13B, [24 * GIB], 64 * GIB),
    "a13b on two": (paper.A13B, [24 * GIB, 24 * GIB], 64 * GIB),
    "a13b in RAM": (paper.A13B, [], 96 * GIB),
    "large": (paper.LARGE, [48 * GIB], 384 * GIB),
    "small": (SMALL, [2 * GIB], 8 * GIB),
}


def measured(file: Path, found: Plan) -> dict[str, buffers.Breakdown]:
    answer = buffers.measure(file, found.arguments(), cards=found.machine.cards, min_batch=found.setting.stream_from)
    return {RAM if name == buffers.HOST else name: memory for name, memory in answer.items()}


@pytest.mark.parametrize("name", MACHINES)
def test_the_engine_counts_as_the_plan_does(name: str, tmp_path: Path) -> None:
    """Weights and cache to the byte, but for what a card rounds up for each tensor; buffers were measured, and fit."""
    model, vram, ram = MACHINES[name]
    file = paper.write(tmp_path / "model.gguf", model)
    found = settle.settle(file, layout.read(file), Machine.paper(vram=vram, ram=ram), Wish(16384))
    engines = measured(file, found)
    assert engines.keys() == {memory.name for memory in found.memories}
    n_tensors = len(found.layout.tensors)
    for memory in found.memories:
        weights = memory.weights
        if not found.devices:  # it need not have repacked the output matrix
            weights = engines[memory.name].weights
            assert memory.layers + memory.experts + memory.embedding <= weights
        assert 0 <= engines[memory.name].weights - weights <= 128 * n_tensors
        assert 0 <= engines[memory.name].kv - memory.kv <= 2 * 512 * found.layout.n_kv_layers
        assert engines[memory.name].compute <= memory.compute
        assert memory.free >= 0


@contextmanager
def running(tool: Path, model: Path, found: Plan, log: Path) -> Iterator[httpx.Client]:
    """The real server, set as planned; the log says why where it does not come up."""
    port = process.free_port("127.0.0.1")
    address = ["--host", "127.0.0.1", "--port", str(port), "--jinja", "--verbosity", "4"]
    with log.open("wb") as file:
        command = [str(tool), "--model", str(model), *address, *found.arguments()]
        child = process.spawn(command, os.environ | found.environment(), file)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=300) as client:
            wait_for(client, child, log)
            yield client
    finally:
        process.stop(child)


def wait_for(client: httpx.Client, child: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert child.poll() is None, log.read_text(errors="replace")[-3000:]
        with suppress(httpx.TransportError):
            if client.get("/health").status_code == httpx.codes.OK:
                return
        time.sleep(0.1)
    raise AssertionError(log.read_text(errors="replace")[-3000:])


def said(log: Path, what: str) -> dict[str, float]:
    """Bytes by buffer, of one kind, as the server's log says them (two digits of MiB)."""
    found = re.findall(rf": +(\S+) +{what} buffer size = +([\d.]+) MiB", log.read_text(errors="replace"))
    return {name.split("[")[0]: float(size) * 2**20 for name, size in found}


def test_the_server_takes_the_arguments(tiny: Path, llama_server: Path, tmp_path: Path) -> None:
    """All of them, on this machine, and answers."""
    found = settle.settle(tiny, layout.read(tiny), Machine.paper(vram=[], ram=8 * GIB, n_core=1), Wish(512))
    log = tmp_path / "log"
    with running(llama_server, tiny, found, log) as client:
        assert client.post("/completion", json={"prompt": "abc", "n_predict": 4}).json()["content"]
        assert client.get("/props").json()["default_generation_settings"]["n_ctx"] == found.setting.n_ctx
    assert sum(said(log, "KV").values()) == pytest.approx(found.ram.kv, abs=0.01 * 2**20)


def test_the_server_places_as_planned(llama_server: Path, tmp_path: Path) -> None:
    """A worker's device takes what RAM has no room for: weights and cache lie where the plan says."""
    model = paper.write(tmp_path / "model.gguf", SMALL)
    about = layout.read(model)
    with rpc_worker() as worker:
        here = probe(rpc=[worker], threads=1, ram=8 * GIB)
        all_in_ram = settle.settle(model, about, replace(here, devices=()), Wish(512)).ram
        part, fixed = RAM_MARGIN
        short = replace(
            here,
            devices=tuple(replace(device, free=500_000_000) for device in here.devices),
            ram_usable=int((all_in_ram.used + fixed - 100_000_000) / (1 - part)),
        )
        found = settle.settle(model, about, short, Wish(512, rpc=(worker,)))
        assert found.runs
        assert 0 < found.n_host_layers + len(found.host_experts) < SMALL.n_layer
        log = tmp_path / "log"
        with running(llama_server, model, found, log) as client:
            assert client.post("/completion", json={"prompt": "abc", "n_predict": 2}).status_code == httpx.codes.OK
    on_device, in_ram = found.memories
    weights = on_device.layers + on_device.experts + on_device.output
    assert said(log, "model")[on_device.name] == pytest.approx(weights, abs=0.01 * 2**20 + 128 * len(about.tensors))
    assert said(log, "KV")[on_device.name] == pytest.approx(on_device.kv, abs=0.01 * 2**20)
    assert said(log, "KV").get("CPU", 0.0) == pytest.approx(in_ram.kv, abs=0.01 * 2**20)


def test_experts_that_a_card_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on a card of little shared memory, for whose experts the Vulkan backend has no kernel: they stay in RAM."""
    count = buffers.measure

    def refusing(file: Path, arguments: Sequence[str], **named: Any) -> Mapping[str, buffers.Breakdown]:
        return count(file, [*arguments, "--override-tensor", "exps=CPU"], **named)

    model, vram, ram = MACHINES["small"]
    file = paper.write(tmp_path / "model.gguf", model)
    asked = (file, layout.read(file), Machine.paper(vram=vram, ram=ram), Wish(16384))
    usual = settle.settle(*asked)
    assert usual.memories[0].experts > 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(buffers, "measure", refusing)
    found = settle.settle(*asked)
    assert capsys.readouterr().err == "warning: GPU0: no kernel for this model's experts; all of them stay in RAM\n"
    assert [device.takes_experts for device in found.devices] == [False]
    assert [run.experts for run in found.runs] == [()]
    assert found.ram.experts == sum(layer.experts for layer in found.layout.layers)
    assert found.setting.stream_from is None, "nothing is sent to it either"
    assert found.speeds.generation < usual.speeds.generation
    assert found.speeds.read[RAM] > usual.speeds.read[RAM]
    monkeypatch.setattr(buffers, "measure", count)
    monkeypatch.setattr(buffers, "measure", count)
    for name, memory in measured(file, found).items():  # an engine that could does as much
        planned = next(planned for planned in found.memories if planned.name == name)
        assert 0 <= memory.weights - planned.weights <= 128 * len(found.layout.tensors)


def test_other_weights_that_a_card_refuses_are_counted_in_ram(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    count = buffers.measure

    def refusing(*arguments: Any, **named: Any) -> dict[str, buffers.Breakdown]:
        found = dict(count(*arguments, **named))
        card, host = found["GPU0"], found[buffers.HOST]
        found["GPU0"] = replace(card, weights=card.weights - card.weights // 2)
        found[buffers.HOST] = replace(host, weights=host.weights + card.weights // 2)
        return found

    model, vram, ram = MACHINES["small"]
    file = paper.write(tmp_path / "model.gguf", model)
    machine = Machine.paper(vram=vram, ram=ram)
    machine = replace(machine, devices=tuple(replace(card, takes_experts=False) for card in machine.devices))
    asked = (file, layout.read(file), machine, Wish(16384))
    usual = settle.settle(*asked)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(buffers, "measure", refusing)
    found = settle.settle(*asked)
    half = found.memories[0].weights // 2
    assert half > 0
    assert found.ram.used - usual.ram.used == pytest.approx(half, rel=0.01)
    assert re.fullmatch(
        r"warning: GPU0 does not compute on [\d.]+ MB of the weights that would lie there; they are counted, and stay, "
        r"in RAM\n",
        capsys.readouterr().err,
    )


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(list(arguments))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = paper.write(tmp_path / "model.gguf", SMALL)
    status, out, err = run(
        capsys, str(file), "--vram", "2G", "--ram", "8G", "--threads", "2", "--ctx", "1000", "--json"
    )
    found: dict[str, Any] = json.loads(out)
    assert (status, err) == (0, "")
    assert found["setting"]["n_ctx"] == 1000
    assert found["setting"]["threads"] == 2
    memories = {memory["name"]: memory for memory in found["memories"]}
    assert set(memories) == {"GPU0", RAM}
    assert memories["GPU0"]["n_bytes"] == 2_000_000_000
    assert memories[RAM]["n_bytes"] == 8_000_000_000
    assert found["speeds"]["sources"] == {"GPU0": "taken from data sheets"}
    assert found["speeds"]["rates"].keys() == {"GPU0"}


def test_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Plain text where there is no terminal; the last line is the command."""
    file = paper.write(tmp_path / "model.gguf", SMALL)
    status, out, err = run(capsys, str(file), "--vram", "2G", "--vram", "1G", "--ram", "8G", "--ctx", "2048")
    assert (status, err.count("\n")) == (0, 1)
    assert "the devices are on paper" in err
    assert "\x1b" not in out
    lines = out.splitlines()
    assert lines[0].startswith("model.gguf: ")
    assert "6 layers, 8 of 64 experts" in lines[0]
    bars = {line.split()[0]: line.split()[1] for line in lines if line.startswith(("GPU", "RAM")) and "GB" in line}
    assert all(len(bar) == 50 and set(bar) <= set("AEOTKCS.-") for bar in bars.values())
    assert "RAM" in bars
    assert "llama-server --model" in lines[-1]
    assert any(line.startswith("prompt ") for line in lines)
    assert any(line.startswith("answer ") for line in lines)
    assert "Speeds are predicted, from rates taken from data sheets." in lines


def test_where_rates_come_from() -> None:
    speeds = Speeds(1.0, 1.0, {}, "", "", {}, {"GPU0": Source.SHEETS, "GPU1": Source.SHEETS, RAM: Source.MODEL})
    assert plan_view.basis(speeds) == "taken from data sheets (GPU0, GPU1) and measured on this model (RAM)"


def test_a_config_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder without weights answers as the file does that it would become."""
    write_large(tmp_path / "large", Large(n_layer=4, n_expert=16, n_embd=320, n_head=4))
    convert(ConvertOptions(tmp_path / "large", tmp_path / "large.gguf", "Q8_0"))
    (tmp_path / "large" / "model.safetensors").unlink()
    options = ("--vram", "1G", "--ram", "4G", "--ctx", "4096", "--json")
    status, out, _ = run(capsys, str(tmp_path / "large"), "--quant", "Q8_0", *options)
    assert status == 0
    guessed = json.loads(out)
    status, out, _ = run(capsys, str(tmp_path / "large.gguf"), *options)
    assert status == 0
    known = json.loads(out)
    assert guessed["model"] == "large-Q8_0.gguf"
    same = ("architecture", "model_bytes", "setting", "layers", "memories", "arguments")
    assert {name: guessed[name] for name in same} == {name: known[name] for name in same}


@pytest.mark.data
def test_the_real_config(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, str(data / "a13b"), "--vram", "24G", "--ram", "64G", "--json")
    found = json.loads(out)
    assert status == 0
    # 45.4 GiB, as the published files of this type
    assert found["model_bytes"] / GIB == pytest.approx(45.4, abs=0.1)
    assert 10 <= 32 - len(found["layers"]["experts_in_ram"]) <= 13


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("missing.gguf",), "error: missing.gguf: no such file"),
        ((".", "--tune"), "error: --tune: got a checkpoint, expected a GGUF"),
        (("model.gguf", "--quant", "Q4_K_M"), "error: model.gguf: its types are chosen"),
        (("blob", "--tune"), "error: blob: tuning needs the weights"),
        (("model.gguf", "--ram", "900M", "--vram", "300M"), "does not fit: got 900.0 MB of RAM and 300.0 MB on GPU0"),
    ],
)
def test_one_line_says_what_is_wrong(
    arguments: tuple[str, ...],
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    paper.write(tmp_path / "model.gguf", SMALL)
    (tmp_path / "blob").symlink_to("model.gguf")
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (1, "")
    assert expected in err
    assert err.count("\n") == 1


def test_an_end_leaves_no_file(tmp_path: Path) -> None:
    """A checkpoint's plan is made from a file of its head."""
    write_large(tmp_path / "large", Large(n_layer=4, n_expert=16, n_embd=320, n_head=4))
    files = tmp_path / "files"
    files.mkdir()
    command = [sys.executable, "-c", "from hymoe.runtime.plan_cli import main; raise SystemExit(main())"]
    environment = {**os.environ, "TMPDIR": str(files)}
    with child([*command, str(tmp_path / "large")], env=environment) as planning:
        while not any(files.glob("*/*")):
            assert planning.poll() is None
            time.sleep(0.01)
        planning.terminate()
        assert planning.wait(60) == 143
    assert not any(files.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        *(("--vram", "much"), ("--for", "fun"), ("--kv", "f64"), ("--ctx", "-1"), ("--quant", "Q9")),
        *(("--threads", "513"), ("--parallel", "257")),  # the engine ends itself for more
    ],
)
def test_wrong_usage(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "model.gguf", *arguments)
    assert (status, out) == (2, "")
    assert "Usage: hy-plan" in err
