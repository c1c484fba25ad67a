"""Layers on other machines: RPC workers on loopback, and in network namespaces of their own."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny_model
from children import child
from served import free_port, served, streaming
from terminal import TIMEOUT, command, is_running, run
from tiny_model import write_model

from hymoe.chat_templates import fallback
from hymoe.engine import cli as engine_cli
from hymoe.runtime import placing, process, serve_cli, workers
from hymoe.runtime.server import ServerOptions
from hymoe.sizes import RAM_MARGIN

pytestmark = pytest.mark.engine

# Half of the layers each, whatever would fit.
SPREAD = ("--", "--n-gpu-layers", "99", "--tensor-split", "1,1", "--fit", "off")
QUESTION: dict[str, Any] = {"prompt": "Say something.", "n_predict": 60}
# Of the kernel's words, those from which hy-serve takes how much RAM there is.
MEMINFO = "MemTotal: {kib} kB\nMemAvailable: {kib} kB\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Long enough a context to be streaming when something happens."""
    return write_model(tmp_path_factory.mktemp("model") / "long.gguf", template=fallback(), trained=65536)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts of 50 MB: more than the settings of a plan can save in RAM."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"N_LAYER": 4, "N_EMBD": 256, "N_FF": 256, "N_EXPERT": 16}.items():
            patch.setattr(tiny_model, name, value)
        return write_model(tmp_path_factory.mktemp("model") / "wide.gguf", template=fallback())


@pytest.fixture
def little_ram(wide: Path, tmp_path: Path) -> list[str]:
    """What runs a program on a machine whose RAM is short by half of the experts. A visible skip without the right."""
    plan = placing.place(ServerOptions(wide, threads=1)).plan
    assert plan is not None
    if plan.machine.devices:
        pytest.skip("a device is here, which takes what RAM has no room for")
    part, fixed = RAM_MARGIN
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(MEMINFO.format(kib=int((plan.ram.used - plan.ram.experts / 2 + fixed) / (1 - part)) >> 10))
    script = f'mount --bind {shlex.quote(str(meminfo))} /proc/meminfo && exec "$@"'
    words = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh"]
    if shutil.which("unshare") is None or run([*words, "true"]).returncode:
        pytest.skip("no right, or no `unshare`, to show a program another /proc/meminfo")
    return words


@contextmanager
def worker(host: str, port: int, prefix: Sequence[str] = ()) -> Iterator[subprocess.Popen[str]]:
    """A worker that answers."""
    words = [*prefix, *command("hy-engine", "rpc", "--host", host, "--port", port, "--threads", 1)]
    with child(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        assert f"worker on {host}:{port}: it has no key and no encryption" in process.stdout.readline()
        deadline = time.monotonic() + TIMEOUT
        while not answers(f"{host}:{port}"):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield process


def answers(place: str) -> bool:
    """Whether the worker there can be reached."""
    try:
        workers.check([place])
    except workers.WorkerError:
        return False
    return True


def devices_of(log: Path) -> dict[str, float]:
    """MiB of weights by device, from the engine's log."""
    found = re.findall(r"load_tensors: +(\S+) model buffer size = +([\d.]+) MiB", log.read_text())
    return {device: float(size) for device, size in found}


def alone(model: Path) -> str:
    """What the model says on one machine."""
    with served(model) as server:
        text: str = server.ask(**QUESTION).json()["content"]
        assert len(text) == 60
        return text


def check_spread(model: Path, places: Sequence[str], log: Path) -> None:
    """The same text, with layers on each of the workers."""
    with served(model, "--rpc", ",".join(places), "--log", log, *SPREAD, "--log-verbosity", "4") as server:
        assert server.ask(**QUESTION).json()["content"] == alone(model)
    sizes = devices_of(log)
    assert all(sizes[f"RPC0[{place}]"] > 0 for place in places)


def check_planned(model: Path, places: Sequence[str], log: Path, little_ram: Sequence[str]) -> None:
    """Nothing says where layers go, and RAM is short: some are on workers, the text is the same, and nothing stays."""
    arguments = ("--rpc", ",".join(places), "--log", log, "--", "--log-verbosity", "4")
    with served(model, *arguments, before=little_ram) as server:
        engine, text = server.engine, server.ask(**QUESTION).json()["content"]
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == 0
    assert text == alone(model)
    assert not is_running(engine)
    assert process.port_is_free("127.0.0.1", server.port)
    assert all(map(answers, places))
    (said,) = (line for line in server.lines if line.startswith("plan: "))
    planned = {f"RPC0[{places[int(index)]}]" for index in re.findall(r"[1-4] of 4 layers on RPC(\d)", said)}
    assert planned
    assert {device for device in devices_of(log) if device.startswith("RPC")} == planned


def test_the_plan_uses_workers_where_ram_is_short(
    llama_server: Path, wide: Path, tmp_path: Path, little_ram: list[str]
) -> None:
    ports = [free_port(), free_port()]
    with worker("127.0.0.1", ports[0]), worker("127.0.0.1", ports[1]):
        check_planned(wide, [f"127.0.0.1:{port}" for port in ports], tmp_path / "engine.log", little_ram)


def test_two_workers_answer_as_one_machine(llama_server: Path, model: Path, tmp_path: Path) -> None:
    ports = [free_port(), free_port()]
    with worker("127.0.0.1", ports[0]), worker("127.0.0.1", ports[1]):
        check_spread(model, [f"127.0.0.1:{port}" for port in ports], tmp_path / "engine.log")


def test_a_worker_that_disappears_is_named_and_waited_for(llama_server: Path, model: Path) -> None:
    ports = [free_port(), free_port()]
    places = [f"127.0.0.1:{port}" for port in ports]
    with worker("127.0.0.1", ports[0]), ExitStack() as second:
        process = second.enter_context(worker("127.0.0.1", ports[1]))
        with served(model, "--rpc", ",".join(places), *SPREAD) as server:
            with streaming(server.url, 1) as (client,):
                process.kill()
                client.join(TIMEOUT)
                assert client.error is not None
            line = server.expect("its log says: Remote RPC server crashed or returned malformed response; ")
            gone = f"warning: RPC worker {places[1]} does not answer: got Connection refused; "
            server.expect(gone, after=line)
            second.enter_context(worker("127.0.0.1", ports[1]))
            server.expect("ready again: ")
            assert server.ask(**QUESTION).json()["content"] == alone(model)


def test_a_worker_that_was_never_there_is_one_line(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = f"127.0.0.1:{free_port()}"
    assert serve_cli.main([str(tiny), "--port", "0", "-q", "--rpc", place]) == 1
    assert capsys.readouterr().err == (
        f"error: RPC worker {place} does not answer: got Connection refused; `hy-engine rpc` starts one there\n"
    )


@pytest.mark.parametrize("text", ["127.0.0.1", ":50052", "host:0", "host:x", "host:1,,host:2"])
def test_workers_are_hosts_and_ports(text: str, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert serve_cli.main([str(tiny), "-q", "--port", "0", "--rpc", text]) == 1
    assert "expected HOST:PORT, or several with commas between" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("host", "line"),
    [
        ("::1", "error: --host: got ::1, expected an IPv4 address of this machine, or 0.0.0.0 for all\n"),
        ("192.0.2.1", "error: 192.0.2.1:50052 cannot be listened on: got Cannot assign requested address\n"),
    ],
)
def test_an_address_for_a_worker(llama_server: Path, host: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert engine_cli.main(["rpc", "--host", host]) == 1
    assert capsys.readouterr().err == line


def test_a_worker_is_stopped_in_one_piece(llama_server: Path) -> None:
    with worker("127.0.0.1", free_port()) as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT) == -signal.SIGTERM


@pytest.fixture
def machines() -> Iterator[list[tuple[str, str]]]:
    """Two network namespaces, each with a cable to ours: names and addresses. A visible skip without the right."""
    with ExitStack() as undo:
        found = []
        for number in range(2):
            name, cable = f"hymoe-{os.getpid()}-{number}", f"hy{os.getpid() % 100000}-{number}"
            ours, theirs = (f"10.231.{os.getpid() % 250}.{4 * number + last}" for last in (1, 2))
            if not ip("netns", "add", name):
                pytest.skip("no right, or no `ip`, to make a network namespace")
            undo.callback(ip, "netns", "delete", name)
            undo.callback(ip, "link", "delete", cable)  # with its namespace it would go, but later
            made = [
                ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", name),
                ip("address", "add", f"{ours}/30", "dev", cable),
                ip("link", "set", cable, "up"),
                ip("-n", name, "address", "add", f"{theirs}/30", "dev", "eth0"),
                ip("-n", name, "link", "set", "eth0", "up"),
            ]
            if not all(made):
                pytest.skip("no right to join network namespaces")
            found.append((name, theirs))
        yield found


def ip(*arguments: str) -> bool:
    """Whether `ip` did it."""
    try:
        return subprocess.run(["ip", *arguments], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@pytest.fixture
def away(llama_server: Path, machines: list[tuple[str, str]]) -> Iterator[list[str]]:
    """A worker on each of two machines."""
    with ExitStack() as both:
        for name, address in machines:
            both.enter_context(worker(address, 50052, ["ip", "netns", "exec", name]))
        yield [f"{address}:50052" for _, address in machines]


def test_workers_in_two_network_namespaces(model: Path, tmp_path: Path, away: list[str]) -> None:
    check_spread(model, away, tmp_path / "engine.log")


def test_the_plan_uses_workers_in_network_namespaces(
    wide: Path, tmp_path: Path, little_ram: list[str], away: list[str]
) -> None:
    check_planned(wide, away, tmp_path / "engine.log", little_ram)


def test_a_cable_that_is_cut_is_noticed(llama_server: Path, model: Path, machines: list[tuple[str, str]]) -> None:
    """Not a connection that is closed: one that says nothing any more, which the check before a start finds."""
    (name, address), _ = machines
    with worker(address, 50052, ["ip", "netns", "exec", name]):
        assert ip("-n", name, "link", "set", "eth0", "down")
        done = run(command("hy-serve", model, "-q", "--port", free_port(), "--rpc", f"{address}:50052"))
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: RPC worker {address}:50052 does not answer: got ")
