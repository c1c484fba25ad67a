"""What becomes of a server when something is killed, taken away or used up: it is back, or one line says why not."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import tiny_model
from served import Served, Streaming, children_of, free_port, limited, served, streaming
from talker import ENDLESS, write_talker
from terminal import TIMEOUT, command, ends, engine_of, engine_of_killed, is_running, run
from tiny_model import write_model

from hymoe.chat_templates import fallback
from hymoe.errors import ModelFileError
from hymoe.runtime import process, supervise
from hymoe.runtime.endpoint import Endpoint
from hymoe.runtime.server import Server, ServerExitError, ServerOptions, serve

pytestmark = pytest.mark.engine

# On top of the time a load takes. A busy machine is given more than the two seconds that are promised.
BACK_SECONDS = 10.0


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_talker(tmp_path_factory.mktemp("model") / "talker.gguf", trained=ENDLESS)


@pytest.fixture
def places(tmp_path: Path) -> dict[str, str]:
    """Folders of the test's own for all that a server might leave behind."""
    folders = {"TMPDIR": tmp_path / "tmp", "HYMOE_LOGS": tmp_path / "logs"}
    for folder in folders.values():
        folder.mkdir()
    return {name: str(folder) for name, folder in folders.items()}


def test_a_killed_engine_is_back_and_clients_are_told(llama_server: Path, talker: Path, places: dict[str, str]) -> None:
    begun = time.monotonic()
    with served(talker, "--ctx", 65536, env=places) as server:
        load_seconds = time.monotonic() - begun
        first = server.engine
        with streaming(server.url) as clients:
            os.kill(first, signal.SIGKILL)
            killed = time.monotonic()
            for client in clients:
                client.join(TIMEOUT)
                assert isinstance(client.error, httpx.RemoteProtocolError | httpx.ReadError)
        server.expect("ready again: ")
        assert time.monotonic() - killed < load_seconds + BACK_SECONDS
        assert not is_running(first)
        assert server.ask(prompt="alphabet<|extra_0|>").json()["content"] == "abcdef"
        assert (
            "warning: the engine stopped while serving: killed by SIGKILL; starting it again in 0.5 s\n" in server.lines
        )
        second = server.engine
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == 0
        assert not is_running(second)
    assert list(Path(places["TMPDIR"]).iterdir()) == []
    assert [file.name for file in Path(places["HYMOE_LOGS"]).iterdir()] == [f"serve-{server.port}.log"]
    assert process.port_is_free("127.0.0.1", server.port)


def test_killing_it_while_clients_stream_kills_the_engine(
    llama_server: Path, talker: Path, places: dict[str, str]
) -> None:
    with served(talker, "--ctx", 65536, env=places) as server, streaming(server.url) as clients:
        engine = server.engine
        server.process.kill()
        assert ends(engine)
        for client in clients:
            client.join(TIMEOUT)
            assert client.error is not None
    assert list(Path(places["TMPDIR"]).iterdir()) == []
    assert process.port_is_free("127.0.0.1", server.port)


def test_killing_it_while_it_loads_kills_the_engine(llama_server: Path, talker: Path, tmp_path: Path) -> None:
    with served(talker, ready=False) as server:
        deadline = time.monotonic() + TIMEOUT
        while not (found := children_of(server.process.pid)):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        server.process.kill()
        assert all(ends(pid) for pid in found)


@pytest.fixture
def copy(talker: Path, tmp_path: Path) -> Path:
    return Path(shutil.copyfile(talker, tmp_path / "copy.gguf"))


def test_a_model_that_is_gone_after_a_crash_is_one_line(llama_server: Path, copy: Path) -> None:
    with served(copy) as server:
        copy.unlink()
        os.kill(server.engine, signal.SIGKILL)
        assert server.end() == 1
    assert server.lines[-1] == f"error: {copy}: no such file: expected a GGUF file; hy-convert makes one\n"
    assert len(server.lines) == 6  # loading, the plan, no key, ready, the crash, this


def test_a_port_that_is_taken_after_a_crash_is_one_line(llama_server: Path, talker: Path) -> None:
    with served(talker) as server:
        os.kill(server.engine, signal.SIGKILL)
        with bound(server.port):
            assert server.end() == 1
    assert server.lines[-1] == (
        f"error: port {server.port}: got one in use by another program, expected a free one; give another with --port\n"
    )


def bound(port: int) -> socket.socket:
    """The port, as soon as it can be had."""
    deadline = time.monotonic() + TIMEOUT
    while True:
        try:
            return socket.create_server(("127.0.0.1", port))
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_an_engine_that_never_serves_again_is_given_up(
    llama_server: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    waits: list[float] = []

    def pause(seconds: float) -> None:
        if seconds >= supervise.FIRST_DELAY:
            waits.append(seconds)
        time.sleep(min(seconds, 0.02))

    def spoil(server: Server) -> None:
        copy.write_bytes(copy.read_bytes()[: copy.stat().st_size // 2])
        pid = engine_of(os.getpid(), "--port", str(server.port))
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        server.wait()

    options = ServerOptions(copy, port=0, threads=1)
    with pytest.raises(ServerExitError, match=r"^the engine stopped while it was starting: exit status 1") as caught:
        supervise.Supervisor(options, spoil, pause).run()
    assert not caught.value.out_of_memory
    assert waits == [0.5, 1, 2, 4, 8]
    assert capsys.readouterr().err.count("; starting it again in ") == 5


def test_the_pauses_between_starts() -> None:
    backoff = supervise.Backoff()
    assert [backoff.after(1.0) for _ in range(9)] == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    assert [backoff.after(supervise.HEALTHY_SECONDS), backoff.after(1.0)] == [0.5, 1]
    # failed starts are counted in a row
    assert [backoff.after(None) for _ in range(4)] == [2, 4, 8, 16]
    assert backoff.after(1.0) == 30
    assert [backoff.after(None) for _ in range(5)] == [30, 30, 30, 30, None]


def test_from_python_it_is_back_too(llama_server: Path, talker: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serve(str(talker)) as endpoint:
        pid = engine_of(os.getpid(), "--port", endpoint.url.rsplit(":", 1)[1])
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        transport = httpx.HTTPTransport(retries=8)  # of connecting, with growing pauses
        with httpx.Client(base_url=endpoint.url, transport=transport, timeout=TIMEOUT) as client:
            while client.get("/health").status_code != httpx.codes.OK:
                time.sleep(0.05)
            answer = client.post("/completion", json={"prompt": "alphabet<|extra_0|>"})
        assert answer.json()["content"] == "abcdef"
        second = engine_of(os.getpid(), "--port", endpoint.url.rsplit(":", 1)[1])
        assert second not in (None, pid)
    assert second is not None
    assert not is_running(second)
    assert "starting it again in 0.5 s" in capsys.readouterr().err


def test_from_python_giving_up_is_raised_at_the_end(llama_server: Path, copy: Path) -> None:
    with pytest.raises(ModelFileError, match="no such file"), serve(copy) as endpoint:
        lose(endpoint, copy)


def lose(endpoint: Endpoint, model: Path) -> None:
    """Take the model away and kill the engine that runs it; wait until it is given up."""
    model.unlink()
    pid = engine_of(os.getpid(), "--port", endpoint.url.rsplit(":", 1)[1])
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    for thread in threading.enumerate():
        if thread.name == "supervisor":
            thread.join(TIMEOUT)


@pytest.mark.parametrize("log", ["/dev/full"])
def test_a_full_disk_for_the_log_is_one_line(llama_server: Path, talker: Path, log: str) -> None:
    done = run(command("hy-serve", talker, "--port", free_port(), "-q", "--log", log))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {log}: cannot write the log: got No space left on device\n"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB; a visible skip where none can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no right to mount a small disk here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_disk_that_fills_up_does_not_end_the_server(llama_server: Path, talker: Path, small_disk: Path) -> None:
    with served(talker, "--log", small_disk / "engine.log") as server:
        fill(small_disk / "more")
        server.expect("warning: the disk of the engine's log is full: lines are lost, serving goes on")
        assert server.ask(prompt="alphabet<|extra_0|>").json()["content"] == "abcdef"
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == 0


def fill(file: Path) -> None:
    """Write until the disk is full."""
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as out:
        while True:
            out.write(bytes(512))


def test_too_little_memory_is_one_line(llama_server: Path, tmp_path: Path) -> None:
    huge = write_model(tmp_path / "huge.gguf", template=fallback(), trained=50_000_000)
    words = ("-q", "--ctx", 0, "--", "--fit", "off")
    with served(huge, *words, ready=False, before=limited(4 << 30)) as server:
        assert server.end() == 1
    (line,) = server.lines
    assert line.startswith("error: the engine stopped while it was starting: ")
    assert line.endswith("it needs more memory than there is: a smaller --ctx, or a file with fewer bits, needs less\n")


def test_a_model_that_does_not_fit_is_one_line(llama_server: Path, tmp_path: Path) -> None:
    huge = write_model(tmp_path / "huge.gguf", template=fallback(), trained=50_000_000)
    done = run(command("hy-serve", huge, "--port", free_port(), "-q", "--ctx", 0))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: huge.gguf with a context of 50000000 tokens does not fit: got ")
    assert done.stderr.count("\n") == 1


def test_a_plan_that_needs_too_much_is_stepped_down_once(
    llama_server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cache takes 1 GiB at 32768 tokens, and the process may have 1 GiB in all."""
    for name, value in {"N_LAYER": 1, "N_HEAD": 64, "N_HEAD_KV": 64, "HEAD_DIM": 128}.items():
        monkeypatch.setattr(tiny_model, name, value)
    wide = write_model(tmp_path / "wide.gguf", template=fallback(), trained=32768)
    # glibc would reserve addresses for every thread.
    f16 = ("--", "--cache-type-k", "f16", "--cache-type-v", "f16")
    with served(wide, *f16, env={"MALLOC_ARENA_MAX": "1"}, before=limited(1 << 30)) as server:
        assert "content" in server.ask(prompt="Hello", n_predict=4).json()
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == 0
    contexts = [int(found) for line in server.lines for found in re.findall(r"plan: context (\d+)", line)]
    assert contexts[0] == 32768 > contexts[1]
    (warning,) = (line for line in server.lines if line.startswith("warning"))
    assert "; it needs more memory than there is: " in warning
    assert f"; once more with less: plan: context {contexts[1]}, " in warning
    assert f"(context {contexts[1]})" in server.lines[-2]


def drained(server: Served, client: Streaming) -> None:
    """Ask the server to stop while `client` reads, and see that nobody else is let in."""
    server.process.send_signal(signal.SIGTERM)
    server.expect("stopping when 1 answer has ended, in ")
    refused = server.ask(prompt="alphabet<|extra_0|>")
    assert (refused.status_code, refused.json()["error"]["message"]) == (503, "The server is stopping")
    assert client.is_alive()


def test_a_stop_lets_running_answers_finish(llama_server: Path, talker: Path) -> None:
    question = {"prompt": "count<|extra_0|>", "n_predict": 4000, "repeat_penalty": 1, "stream": True}
    with served(talker, "--ctx", 8192) as server:
        client = Streaming(server.url, question)
        client.start()
        assert client.begun.wait(TIMEOUT)
        drained(server, client)
        client.join(TIMEOUT)
        assert (server.end(), client.error) == (0, None)
    assert "".join(client.pieces) == 2000 * "one two"
    assert not [line for line in server.lines if line.startswith("warning")]


def test_a_stop_does_not_wait_for_ever(llama_server: Path, talker: Path) -> None:
    with served(talker, "--ctx", 65536, "--drain", 0.5) as server, streaming(server.url, 1) as (client,):
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == 0
        client.join(TIMEOUT)
        assert client.error is not None
    assert server.lines[-1] == "warning: cut what was not answered after 0.5 s\n"


def test_a_second_signal_stops_at_once(llama_server: Path, talker: Path) -> None:
    with served(talker, "--ctx", 65536, "--drain", 1000) as server, streaming(server.url, 1) as (client,):
        engine = server.engine
        drained(server, client)
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == 128 + signal.SIGTERM
        assert not is_running(engine)


def test_the_engine_dies_with_the_process_that_serves_from_python(llama_server: Path, talker: Path) -> None:
    code = (
        "import sys, time; from hymoe.runtime import serve\n"
        "with serve(sys.argv[1]): print('up', flush=True); time.sleep(600)"
    )
    assert ends(engine_of_killed(code, talker))
