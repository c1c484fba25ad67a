"""`hy-serve` as a user meets it: the whole screen, exit statuses, and no process left behind."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from children import child
from served import free_port
from terminal import TIMEOUT, Terminal, command, ends, engine_of, is_running, run
from tiny_model import TRAINED, write_model

from hymoe.runtime import chat_cli, serve_cli

pytestmark = pytest.mark.engine

NO_KEY = "no key is set: pages in a browser can use this server too; HYMOE_API_KEY sets a key\n"


@pytest.fixture
def port() -> int:
    return free_port()


@contextmanager
def serving(model: Path, port: int, *more: object, note: str = NO_KEY) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A healthy hy-serve and its engine's process id."""
    words = command("hy-serve", model, "--port", port, "--threads", 1, *more)
    with child(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as parent:
        assert parent.stderr is not None
        text = ""
        while not text.endswith(f"ready: http://127.0.0.1:{port} (context {TRAINED})\n"):
            line = parent.stderr.readline()
            assert line, text
            text += line
        assert unplanned(text) == f"{loading(model, port)}{note}{line}"
        engine = engine_of(parent.pid)
        assert engine is not None
        yield parent, engine


def loading(model: Path, port: int) -> str:
    """The first line of a server that is given no log."""
    log = Path(os.environ["HYMOE_LOGS"]) / f"serve-{port}.log"
    return f"loading {model} (the engine's log: {log})\n"


def unplanned(text: str) -> str:
    """`text` without the plan's line, which has this machine's numbers."""
    return re.sub(
        r"^plan: context \d+, f16 cache, about \d+ tokens/s reading and [\d.]+ writing \(hy-plan says more\)\n",
        "",
        text,
        count=1,
        flags=re.MULTILINE,
    )


def status_of(port: int, key: str = "") -> int:
    """The status of an answer that needs the key, where there is one."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    url = f"http://127.0.0.1:{port}/v1/models"
    return httpx.get(url, headers=headers, trust_env=False, timeout=TIMEOUT).status_code


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_it_in_order(llama_server: Path, tiny: Path, port: int, number: signal.Signals) -> None:
    with serving(tiny, port) as (parent, engine):
        assert status_of(port) == 200
        parent.send_signal(number)
        out, err = parent.communicate(timeout=TIMEOUT)
        assert (parent.returncode, out, err) == (0, "", "stopping\n")
        assert not is_running(engine)
        assert "model loaded" in Path(os.environ["HYMOE_LOGS"], f"serve-{port}.log").read_text()


def test_killing_it_kills_the_engine(llama_server: Path, tiny: Path, port: int) -> None:
    with serving(tiny, port) as (parent, engine):
        parent.kill()
        parent.wait()
        assert ends(engine)


def test_an_engine_that_ends_in_order_is_not_started_again(llama_server: Path, tiny: Path, port: int) -> None:
    with serving(tiny, port) as (parent, engine):
        os.kill(engine, signal.SIGTERM)
        _, err = parent.communicate(timeout=TIMEOUT)
        assert parent.returncode == 0
        assert "error: the engine stopped while serving: exit status 0" in err
        assert "  | " in err  # the end of its log


def test_ctrl_c_on_a_terminal(llama_server: Path, tiny: Path, port: int) -> None:
    with Terminal(command("hy-serve", tiny, "--port", port, "--threads", 1)) as terminal:
        terminal.expect("ready")
        terminal.type("\x03")
        assert terminal.wait() == 0
        assert "\nplan: context 512, f16 cache, about " in terminal.screen
        assert unplanned(terminal.screen) == (
            f"{loading(tiny, port)}{NO_KEY}ready: http://127.0.0.1:{port} (context {TRAINED})\n^Cstopping\n"
        )


def test_ctrl_c_says_how_many_experts_were_used(llama_server: Path, tiny: Path, port: int) -> None:
    with serving(tiny, port, "--router", "adaptive:1,1") as (parent, _):
        body = {"prompt": "Hello", "n_predict": 4}
        url = f"http://127.0.0.1:{port}/completion"
        assert httpx.post(url, json=body, trust_env=False, timeout=TIMEOUT).status_code == 200
        parent.send_signal(signal.SIGINT)
        _, err = parent.communicate(timeout=TIMEOUT)
    assert err == "experts used per token and layer: 1.00 (adaptive:1,1)\nstopping\n"


def test_a_key_from_the_environment(llama_server: Path, tiny: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    key = "".join(map(chr, range(0x21, 0x7F))).replace(",", "").replace('"', "")  # all that is accepted
    monkeypatch.setenv("HYMOE_API_KEY", key)
    with serving(tiny, port, note=""):
        assert status_of(port) == 401
        assert status_of(port, key[:-1]) == 401
        assert status_of(port, key) == 200
        done = run(command("hy-chat", "--url", f"127.0.0.1:{port}", "-p", "Hello", "--max-tokens", 5, "-q"))
        assert (done.returncode, done.stderr) == (0, "")


def test_keys_from_a_file(llama_server: Path, tiny: Path, port: int, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# ours\nab\ncd\n")
    keys.chmod(0o600)
    with serving(tiny, port, "--api-key-file", keys, note=""):
        assert [status_of(port, key) for key in ("", "ab", "cd", "# ours")] == [401, 200, 200, 401]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_keys_that_others_can_read_are_warned_about(mode: int, tmp_path: Path) -> None:
    """Once, and before anything else is looked at."""
    keys = tmp_path / "keys"
    keys.write_text("ab\n")
    keys.chmod(mode)
    done = run(command("hy-serve", tmp_path / "none.gguf", "--port", 0, "-q", "--api-key-file", keys))
    warning, error = done.stderr.splitlines()
    assert warning == (
        f"warning: --api-key-file {keys}: other users of this machine can read or change it; chmod 600 mends that"
    )
    assert error.startswith("error: ")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (None, ": cannot be read: got No such file or directory"),
        ("# none yet\n", ": got no key in it, expected one a line"),
        ("sesame\r\n", ": got line ends of Windows, expected a newline alone; dos2unix mends it"),
    ],
)
def test_a_file_without_a_key_is_one_line(
    text: str | None, line: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = tmp_path / "keys"
    if text is not None:
        keys.write_text(text, newline="")
    assert serve_cli.main([str(tiny), "--port", "0", "-q", "--api-key-file", str(keys)]) == 1
    assert capsys.readouterr() == ("", f"error: --api-key-file {keys}{line}\n")


@pytest.mark.parametrize("key", ["ab,cd", ",", "a b", " ", 'a"b', "schlüssel", "a\n", "\x7f", "\udcff"])
@pytest.mark.parametrize("name", ["hy-serve", "hy-chat"])
def test_a_key_that_would_not_arrive_is_one_line(
    name: str, key: str, tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYMOE_API_KEY", key)
    if name == "hy-serve":
        status = serve_cli.main([str(tiny), "--host", "0.0.0.0", "-q"])
    else:
        status = chat_cli.main(["--url", "127.0.0.1:9", "-p", "Hello"])
    assert status == 1
    assert capsys.readouterr() == (
        "",
        "error: API key: got one with other characters, expected printable ASCII without spaces, commas and double "
        "quotes; choose another\n",
    )


@pytest.mark.parametrize("origin", ["null", "http://localhost:3000"])
def test_pages_in_a_browser_may_ask(llama_server: Path, tiny: Path, port: int, origin: str) -> None:
    """Opened as a file (`null`) too, without a flag, and also where the key is wrong: they must see that it is."""
    asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    with serving(tiny, port):
        for method, path in (("OPTIONS", "/completion"), ("GET", "/v1/models")):
            answer = httpx.request(
                method, f"http://127.0.0.1:{port}{path}", headers=asked, trust_env=False, timeout=TIMEOUT
            )
            assert (answer.status_code, answer.headers["Access-Control-Allow-Origin"]) == (200, origin)


def test_the_whole_network_needs_a_key(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert serve_cli.main([str(tiny), "--host", "0.0.0.0", "--port", "0", "-q"]) == 1
    assert capsys.readouterr().err == (
        "error: --host 0.0.0.0: everybody who reaches it could use this server; "
        "set HYMOE_API_KEY or give --api-key-file FILE, or --insecure where that is meant\n"
    )


def test_the_whole_network_without_a_key_is_warned_about(llama_server: Path, tiny: Path, port: int) -> None:
    words = command("hy-serve", tiny, "--host", "0.0.0.0", "--insecure", "--port", port, "--threads", 1)
    with Terminal(words) as terminal:
        terminal.expect(f"ready: http://127.0.0.1:{port} ")
        terminal.type("\x03")
        assert terminal.wait() == 0
    warning = "warning: everybody who reaches 0.0.0.0 can use this server; HYMOE_API_KEY sets a key\n"
    assert unplanned(terminal.screen).startswith(f"{loading(tiny, port)}{warning}ready: ")


def test_quiet_says_nothing_and_verbose_shows_the_log(llama_server: Path, tiny: Path, port: int) -> None:
    flag = "--no-such-flag"
    quiet = run(command("hy-serve", tiny, "--port", port, "-q", "--", flag))
    assert (quiet.returncode, quiet.stdout) == (1, "")
    assert quiet.stderr.startswith("error: the engine stopped while it was starting: exit status 1; its log says: ")
    assert quiet.stderr.count("\n") == 1
    verbose = run(command("hy-serve", tiny, "--port", port, "-v", "--", flag))
    said = unplanned(verbose.stderr)
    assert said.startswith(f"{loading(tiny, port)}starting {llama_server} --model {tiny} --host 127.0.0.1 ")
    assert verbose.stderr.endswith(quiet.stderr)
    assert "  | " not in verbose.stderr  # shown once is enough


def test_a_taken_port_is_one_line(llama_server: Path, tiny: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = run(command("hy-serve", tiny, "--port", port))
    assert (done.returncode, done.stdout) == (1, "")
    assert unplanned(done.stderr) == (
        f"{loading(tiny, port)}error: port {port}: got one in use by another program, expected a free one; "
        "give another with --port\n"
    )


@pytest.mark.parametrize(
    ("main", "more"), [(serve_cli.main, []), (chat_cli.main, ["-p", "Hello"])], ids=["hy-serve", "hy-chat"]
)
def test_bad_models_are_one_line(
    main: Callable[[list[str]], int], more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, llama = tmp_path / "text.gguf", write_model(tmp_path / "llama.gguf", architecture="llama")
    text.write_text("# hello\n")
    lines = {
        tmp_path / "none.gguf": "no such file: expected a GGUF file; hy-convert makes one",
        tmp_path: "model: got a folder, expected a GGUF file; hy-convert makes one from a checkpoint folder",
        text: "not a GGUF: got '# he', expected 'GGUF' at its start; hy-convert makes one",
        llama: "architecture: got llama, expected hunyuan-moe or hunyuan-large; "
        "hymoe runs HunYuan mixture-of-experts models; make one with hy-convert",
    }
    for path, line in lines.items():
        assert main([str(path), "-q", *more]) == 1
        assert capsys.readouterr() == ("", f"error: {path}: {line}\n")


def test_no_engine_is_one_line(tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HYMOE_ENGINE", raising=False)
    done = run(command("hy-serve", tiny, "-q"), env={"HYMOE_CACHE": str(tmp_path)})
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: no engine in ")
    assert "hy-engine build" in done.stderr


@pytest.mark.parametrize("words", [[], ["m.gguf", "--port", "70000"], ["m.gguf", "--ctx", "-1"]])
def test_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert serve_cli.main(words) == 2
    assert "Usage: hy-serve" in capsys.readouterr().err


def test_help_is_instant_and_names_everything() -> None:
    done = run([*command("hy-serve")[:1], "-X", "importtime", *command("hy-serve", "--help")[1:]])
    assert done.returncode == 0
    for flag in ("--host", "--port", "--ctx", "--threads", "--log", "--quiet", "--verbose", "HYMOE_API_KEY"):
        assert flag in done.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert not imported & {"httpx", "numpy", "gguf", "jinja2", "rich.progress"}
