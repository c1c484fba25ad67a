"""The server process by itself: health, key, port, death."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import httpx
import openai
import pytest
from children import child
from openai.types.chat import ChatCompletionMessageParam
from terminal import TIMEOUT, ends, engine_of, engine_of_killed, is_running
from tiny_model import TRAINED, write_model

from hymoe import console
from hymoe.errors import ModelFileError, OutputError, ServerError
from hymoe.runtime import process
from hymoe.runtime.endpoint import Endpoint
from hymoe.runtime.header import peek
from hymoe.runtime.router import Router, engine_arguments
from hymoe.runtime.server import (
    DEFAULT_CTX,
    OWNED_FLAGS,
    Server,
    ServerExitError,
    ServerOptions,
    command_line,
    context_size,
    serve,
)

pytestmark = pytest.mark.engine

QUESTION = [{"role": "user", "content": "Say something."}]


def openai_client(endpoint: Endpoint, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key=key, max_retries=0)


def engine_at(endpoint: Endpoint) -> int:
    """The process id of the engine that this process runs there."""
    pid = engine_of(os.getpid(), "--port", endpoint.url.rsplit(":", 1)[1])
    assert pid is not None
    return pid


@pytest.mark.parametrize(("own", "found"), [(None, "30000"), ("5", "5")])
def test_threads_sleep_while_another_program_has_the_processor(
    own: str | None, found: str, llama_server: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Soon, unless the user says when."""
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    if own:
        monkeypatch.setenv("GOMP_SPINCOUNT", own)
    with serve(ServerOptions(tiny, port=0)) as endpoint:
        variables = Path(f"/proc/{engine_at(endpoint)}/environ").read_text().split("\0")
    assert [variable for variable in variables if "SPIN" in variable] == [f"GOMP_SPINCOUNT={found}"]


def test_the_openai_client_streams_what_it_gets_at_once(endpoint: Endpoint) -> None:
    question: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Say something."}]
    with openai_client(endpoint, endpoint.api_key or "") as client:
        create = client.chat.completions.create
        whole = create(model="any", messages=question, max_tokens=40)
        chunks = list(create(model="any", messages=question, max_tokens=40, stream=True))
    streamed = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert len([piece for piece in streamed if piece]) > 10
    assert "".join(streamed) == whole.choices[0].message.content
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 40


@pytest.mark.parametrize("key", ["wrong", ""])
def test_without_the_key_nothing_is_answered(endpoint: Endpoint, key: str) -> None:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(base_url=endpoint.url, headers=headers, trust_env=False, timeout=TIMEOUT) as client:
        for path in ("/v1/models", "/props", "/slots"):
            assert client.get(path).status_code == 401
        assert client.post("/v1/chat/completions", json={"messages": QUESTION}).status_code == 401
        assert client.get("/health").status_code == 200
    with openai_client(endpoint, key or "none") as bare, pytest.raises(openai.AuthenticationError):
        bare.models.list()


def test_the_key_is_not_on_the_command_line(llama_server: Path, tiny: Path) -> None:
    with Server(ServerOptions(tiny, port=0, api_key="sesame-1234", threads=1)) as server:
        process_files = Path(f"/proc/{engine_at(server.endpoint)}")
        assert b"sesame" not in (process_files / "cmdline").read_bytes()
        assert b"LLAMA_API_KEY=sesame-1234\0" in (process_files / "environ").read_bytes()


def test_a_proxy_in_the_environment_is_not_asked(
    llama_server: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    with serve(ServerOptions(tiny, port=0, threads=1)) as endpoint:
        assert httpx.get(f"{endpoint.url}/health", trust_env=False, timeout=TIMEOUT).json() == {"status": "ok"}


def test_leaving_stops_the_engine(llama_server: Path, tiny: Path) -> None:
    with Server(ServerOptions(tiny, port=0, threads=1)) as server:
        pid = engine_at(server.endpoint)
        assert is_running(pid)
        assert process.owns_port(pid, int(server.endpoint.url.rsplit(":", 1)[1]))
        assert not process.owns_port(os.getpid(), int(server.endpoint.url.rsplit(":", 1)[1]))
    assert not is_running(pid)
    assert server.stop() == 0


def test_an_engine_that_dies_is_told(llama_server: Path, tiny: Path) -> None:
    with Server(ServerOptions(tiny, port=0, threads=1)) as server:
        os.kill(engine_at(server.endpoint), signal.SIGKILL)
        with pytest.raises(ServerExitError, match=r"^the engine stopped while serving: killed by SIGKILL") as caught:
            server.wait()
    assert caught.value.status == 128 + signal.SIGKILL


def test_the_log_is_appended_to_a_file(llama_server: Path, tiny: Path, tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    log.write_text("before\n")
    with serve(ServerOptions(tiny, port=0, threads=1, log=log)):
        pass
    assert log.read_text().startswith("before\n")
    assert "model loaded" in log.read_text()
    with (
        pytest.raises(OutputError, match=f"{tmp_path}: cannot write the log: got Is a directory"),
        serve(ServerOptions(tiny, port=0, log=tmp_path)),
    ):
        pass


def test_a_model_without_a_template_gets_ours(llama_server: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "bare.gguf")
    with serve(ServerOptions(model, port=0, threads=1)) as endpoint:
        answer = httpx.post(
            f"{endpoint.url}/apply-template", json={"messages": QUESTION}, trust_env=False, timeout=TIMEOUT
        )
    assert answer.json() == {"prompt": "<|startoftext|>Say something.<|extra_0|>"}


def test_a_taken_port(llama_server: Path, tiny: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ServerError) as caught, serve(ServerOptions(tiny, port=port)):
            pass
    assert str(caught.value) == (
        f"port {port}: got one in use by another program, expected a free one; give another with --port"
    )


def test_a_port_taken_after_the_look(llama_server: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stranger binds between our look and the engine's bind, and even answers that it is healthy."""
    with child([sys.executable, "-c", STRANGER], stdout=subprocess.PIPE) as stranger:
        assert stranger.stdout is not None
        port = int(stranger.stdout.readline())
        looks = iter([True])  # the first look sees a free port, the later ones look for themselves
        really = process.port_is_free
        monkeypatch.setattr(process, "port_is_free", lambda host, p: next(looks, None) or really(host, p))
        with (
            pytest.raises(ServerError, match=f"^port {port}: got one in use by another"),
            serve(ServerOptions(tiny, port=port)),
        ):
            pass
        assert next(looks, None) is None


STRANGER = """
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("Content-Length", "0"); self.end_headers()
    def log_message(self, *_): pass
server = HTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


def test_a_host_that_is_not_ours(llama_server: Path, tiny: Path) -> None:
    with pytest.raises(ServerError, match=r"^host 192\.0\.2\.1: no address of this machine; leave out --host"):
        Server(ServerOptions(tiny, host="192.0.2.1", insecure=True)).__enter__()
    # Neither is looked up by DNS: an interface that does not exist, and no name at all.
    for host, reason in (("::1%no-such-interface", "[^;]+"), ("a..b", "no name of a host")):
        with pytest.raises(ServerError, match=rf"^host {host}: {reason}; give an address of this machine with --host"):
            Server(ServerOptions(tiny, host=host, insecure=True)).__enter__()


@pytest.mark.skipif(not socket.has_ipv6 or not Path("/proc/net/if_inet6").exists(), reason="no IPv6 here")
@pytest.mark.parametrize("host", ["::1", "::"])
def test_ipv6(llama_server: Path, tiny: Path, host: str) -> None:
    with serve(ServerOptions(tiny, host=host, port=0, threads=1, insecure=True)) as endpoint:
        assert endpoint.url.startswith("http://[::1]:")
        answer = httpx.get(f"{endpoint.url}/health", trust_env=False, timeout=TIMEOUT)
        assert answer.json() == {"status": "ok"}


@pytest.mark.parametrize("flag", OWNED_FLAGS)
def test_arguments_that_are_ours_to_give(tiny: Path, flag: str) -> None:
    with pytest.raises(ServerError) as caught, serve(ServerOptions(tiny, extra=("--verbose-prompt", flag, "1"))):
        pass
    assert str(caught.value) == f"llama-server argument {flag}: not accepted; {OWNED_FLAGS[flag]}"


@pytest.mark.parametrize("argument", ["--api_key", "--api-key=abc", "--api_key=abc"])
def test_arguments_that_are_ours_to_give_spelled_otherwise(tiny: Path, argument: str) -> None:
    with pytest.raises(ServerError, match=r"^llama-server argument --api-key: not accepted; set HYMOE_API_KEY"):
        Server(ServerOptions(tiny, extra=(argument,))).__enter__()


def test_an_engine_that_ends_before_it_serves_has_failed(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its own exit status says."""
    (tmp_path / "llama-server").write_text("#!/bin/sh\necho done\n")
    (tmp_path / "llama-server").chmod(0o755)
    monkeypatch.setenv("HYMOE_ENGINE", str(tmp_path))
    with pytest.raises(ServerExitError, match=r"^the engine stopped while it was starting: exit status 0$") as caught:
        Server(ServerOptions(tiny, port=0)).__enter__()
    assert (caught.value.status, caught.value.tail) == (1, ["done"])


def test_an_argument_the_engine_rejects(llama_server: Path, tiny: Path) -> None:
    with (
        pytest.raises(
            ServerExitError, match=r"^the engine stopped while it was starting: exit status 1; its log says: "
        ),
        serve(ServerOptions(tiny, port=0, extra=("--no-such-flag",))),
    ):
        pass


def test_a_file_the_engine_cannot_load(llama_server: Path, tiny: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny.read_bytes()[: tiny.stat().st_size // 2])
    with pytest.raises(ServerExitError) as caught, serve(ServerOptions(cut, port=0)):
        pass
    assert caught.value.status == 1
    assert "its log says:" in str(caught.value)


def test_a_missing_model_needs_no_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYMOE_ENGINE", str(tmp_path))
    with pytest.raises(ModelFileError, match="no such file"), serve(ServerOptions(tmp_path / "none.gguf")):
        pass


def test_variables_that_would_change_the_engine_are_dropped(
    llama_server: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLAMA_ARG_CONTEXT_SHIFT", "1")
    monkeypatch.setenv("AIP_MODE", "PREDICTION")  # would move the port to 8080
    with serve(ServerOptions(tiny, port=0, threads=1)) as endpoint:
        assert httpx.get(f"{endpoint.url}/health", trust_env=False, timeout=TIMEOUT).status_code == 200
    warning = "warning: AIP_MODE, LLAMA_ARG_CONTEXT_SHIFT: ignored; give llama-server arguments after --\n"
    assert capsys.readouterr().err == warning


def test_the_engine_dies_when_its_parent_is_killed(llama_server: Path, tiny: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from hymoe.runtime.server import Server, ServerOptions\n"
        "with Server(ServerOptions(Path(sys.argv[1]), port=0, threads=1)) as server:\n"
        "    print('up', flush=True); time.sleep(600)"
    )
    assert ends(engine_of_killed(code, tiny))


def test_a_child_whose_parent_died_before_the_call_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """The window between fork and prctl: the child sees another parent than the one it was made by, and ends."""
    monkeypatch.setattr(os, "getppid", lambda: 1)
    with process.Log(None) as log:
        child = process.spawn([sys.executable, "-c", "print('ran')"], dict(os.environ), log.file)
        assert child.wait(TIMEOUT) == 127
        assert log.tail(5) == []


def test_a_stubborn_child_is_killed(tmp_path: Path) -> None:
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
    )
    with process.Log(None) as log:
        child = process.spawn([sys.executable, "-c", code], dict(os.environ), log.file)
        deadline = time.monotonic() + TIMEOUT
        while not log.tail(1):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert process.stop(child, 0.2) == -signal.SIGKILL
    assert process.describe(-signal.SIGKILL) == "killed by SIGKILL"
    assert process.shell_status(-signal.SIGKILL) == 137


def test_signals_become_exceptions_and_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(process.Terminated) as caught, process.signals_as_exceptions():
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before


def test_other_threads_may_serve_too(llama_server: Path, tiny: Path) -> None:
    seen: list[int] = []

    def work() -> None:
        with process.signals_as_exceptions(), serve(ServerOptions(tiny, port=0, threads=1)) as endpoint:
            seen.append(httpx.get(f"{endpoint.url}/health", trust_env=False, timeout=TIMEOUT).status_code)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(TIMEOUT)
    assert seen == [200]


def test_log_lines_come_whole(tmp_path: Path) -> None:
    with process.Log(None) as log:
        os.write(log.file.fileno(), b"eins\nzw")
        assert log.new_lines() == ["eins"]
        os.write(log.file.fileno(), b"ei\n\xff\n\n")
        assert log.new_lines() == ["zwei", "\ufffd", ""]
        assert log.tail(2) == ["zwei", "\ufffd"]


def test_an_unnamed_log_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child's own descriptor goes on at the new beginning; all lines are seen, and the last ones stay at hand."""
    monkeypatch.setattr(process, "LOG_BYTES", 1000)
    code = "import sys\nfor line in sys.stdin: sys.stdout.write(line); sys.stdout.flush(); sys.stderr.write('.\\n')"
    with process.Log(None) as log:
        words = [sys.executable, "-c", code]
        with subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=log.file, stderr=subprocess.PIPE, text=True
        ) as child:
            assert child.stdin is not None
            assert child.stderr is not None
            sizes, seen = [], []
            for i in range(200):
                child.stdin.write(f"line {i}\n")
                child.stdin.flush()
                assert child.stderr.readline() == ".\n"  # it is written
                sizes.append(os.fstat(log.file.fileno()).st_size)
                seen += log.new_lines()
                assert log.tail(3) == [f"line {n}" for n in range(max(i - 2, 0), i + 1)]
            child.stdin.close()
    assert seen == [f"line {i}" for i in range(200)]
    assert 1000 < max(sizes) < 1100


def test_a_log_of_the_users_is_never_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "LOG_BYTES", 10)
    path = tmp_path / "engine.log"
    with process.Log(path) as log:
        for _ in range(5):
            os.write(log.file.fileno(), b"0123456789\n")
            assert log.new_lines() == ["0123456789"]
    assert path.read_bytes().endswith(b"Z\n" + 5 * b"0123456789\n")


def test_a_log_with_a_limit_starts_over_and_keeps_a_copy(tmp_path: Path) -> None:
    path, copy = tmp_path / "engine.log", tmp_path / "engine.log.1"
    with process.Log(path, limit=100) as log:
        for i in range(30):
            os.write(log.file.fileno(), f"line {i:04}\n".encode())
            assert log.new_lines() == [f"line {i:04}"]
            assert log.tail(1) == [f"line {i:04}"]
    kept = copy.read_text() + path.read_text()
    assert kept.endswith("".join(f"line {i:04}\n" for i in range(20, 30)))
    assert path.stat().st_size <= 100 < copy.stat().st_size <= 110


def test_a_log_on_a_full_disk_is_one_line() -> None:
    with pytest.raises(OutputError, match=r"^/dev/full: cannot write the log: got No space left on device$"):
        process.Log(Path("/dev/full"))


def test_context_size(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = peek(tiny)
    large = peek(write_model(tmp_path / "large.gguf", trained=262144))
    assert (context_size(None, small), context_size(None, large)) == (TRAINED, DEFAULT_CTX)
    assert (context_size(0, large), context_size(100, large)) == (262144, 100)
    assert capsys.readouterr().err == ""
    assert context_size(1000, small) == TRAINED
    assert "--ctx 1000 is more than the 512 tokens" in capsys.readouterr().err
    unknown = peek(write_model(tmp_path / "unknown.gguf", trained=None))
    assert context_size(None, unknown) == DEFAULT_CTX
    with pytest.raises(ServerError, match="does not say its trained context: got --ctx 0, expected a number of tokens"):
        context_size(0, unknown)


def test_the_command_line(tiny: Path) -> None:
    options = ServerOptions(tiny, port=81, threads=3, api_key="secret", extra=("--temp", "0"))
    words = command_line(Path("llama-server"), peek(tiny), options, 512)
    fixed = "--host 127.0.0.1 --port 81 --no-context-shift --jinja --ctx-size 512 --threads 3 --metrics"
    assert words == ["llama-server", "--model", str(tiny), *fixed.split(), "--temp", "0"]


def test_the_command_line_of_a_router(tiny: Path, tmp_path: Path) -> None:
    header = peek(tiny)

    def arguments(router: Router | None, n_ctx: int = 512) -> list[str]:
        return engine_arguments(router, header, n_ctx)

    assert arguments(None) == []
    assert arguments(Router("topk")) == ["--override-kv", "hunyuan-moe.router.mode=str:topk"]
    keys = ("mode=str:adaptive", "min_experts=int:4", "threshold=float:0.1")
    words = [word for key in keys for word in ("--override-kv", f"hunyuan-moe.router.{key}")]
    assert arguments(Router("adaptive", 4, 0.1)) == words
    whole = ["--batch-size", "512", "--ubatch-size", "512", "--no-cache-prompt", "--cache-ram", "0"]
    assert arguments(Router("capacity"))[2:] == whole
    assert arguments(Router("capacity"), 32768)[2:] == [word.replace("512", "8192") for word in whole]
    # a file that asks for it gets the same
    asking = replace(header, scalars={**header.scalars, "hunyuan-moe.router.mode": "capacity"})
    assert engine_arguments(None, asking, 512) == whole
    # with one expert per token nothing is dropped
    single = replace(header, scalars={**asking.scalars, "hunyuan-moe.expert_used_count": 1})
    assert engine_arguments(None, single, 512) == []


def test_details_show_the_engines_log(llama_server: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console.set_verbosity(verbose=True)
    try:
        with serve(ServerOptions(tiny, port=0, threads=1)):
            pass
    finally:
        console.set_verbosity()
    assert "model loaded" in capsys.readouterr().err
