"""`hy-chat` as a user meets it: one answer through pipes, and a conversation on a terminal."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from terminal import TIMEOUT, Terminal, command, ends, engine_of, is_running, run
from tiny_model import N_EXPERT_USED, TRAINED, write_model

from hymoe.chat_templates import fallback
from hymoe.errors import ServerError
from hymoe.runtime.chat_cli import main
from hymoe.runtime.endpoint import Endpoint, endpoint_from_url, is_loopback
from hymoe.runtime.process import free_port
from hymoe.runtime.server import ServerOptions, serve

pytestmark = pytest.mark.engine

N = 12  # tokens of an answer: letters, as many as tokens
LIMIT = ("--max-tokens", N)
INTRODUCTION = "/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves\n"


def expected(endpoint: Endpoint, *messages: str, system: str | None = None) -> str:
    """What the server answers to user, assistant, user, … asked without hy-chat."""
    talk = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(messages)]
    opening = [{"role": "system", "content": system}] if system else []
    answer = httpx.post(
        f"{endpoint.url}/v1/chat/completions",
        json={"messages": opening + talk, "max_tokens": N},
        headers={"Authorization": f"Bearer {endpoint.api_key}"},
        trust_env=False,
        timeout=TIMEOUT,
    )
    text = answer.json()["choices"][0]["message"]["content"]
    assert isinstance(text, str)
    return text


@pytest.fixture
def attach(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command that talks to the shared server."""
    monkeypatch.setenv("HYMOE_API_KEY", endpoint.api_key or "")
    return command("hy-chat", "--url", endpoint.url)


def test_the_router_mode_reaches_the_engine_and_is_reported(tiny: Path) -> None:
    asked = [*command("hy-chat", tiny, "-p", "Hello", "--json", "-q"), *map(str, LIMIT)]
    every = json.loads(run(asked).stdout)["timings"]
    assert (every["experts_prompt"], every["experts_predicted"]) == (N_EXPERT_USED, N_EXPERT_USED)
    fewer = json.loads(run([*asked, "--router", "adaptive:1,1"]).stdout)["timings"]
    assert (fewer["experts_prompt"], fewer["experts_predicted"]) == (1, 1)
    wrong = run([*asked, "--router", "best"])
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert wrong.stderr.startswith("error: --router: got best, expected topk, capacity, adaptive")


def test_one_shot_with_a_private_server(endpoint: Endpoint, tiny: Path) -> None:
    done = run(command("hy-chat", tiny, "-p", "Hello", *LIMIT))
    assert (done.returncode, done.stdout) == (0, expected(endpoint, "Hello") + "\n")
    assert done.stderr == f"loading {tiny}\nready (context {TRAINED})\ncut at max_tokens\n"


def test_one_shot_from_a_pipe(endpoint: Endpoint, attach: list[str]) -> None:
    answer = expected(endpoint, "Wie geht's? 你好")
    for words in (attach, [*attach, "-p", "-"]):
        done = run([*words, *map(str, LIMIT), "-q"], stdin="Wie geht's? 你好\n".encode())
        assert (done.returncode, done.stdout, done.stderr) == (0, answer + "\n", "")


def test_a_system_prompt(endpoint: Endpoint, attach: list[str]) -> None:
    answer = expected(endpoint, "Hello", system="Be brief.")
    assert answer != expected(endpoint, "Hello")
    done = run([*attach, "-p", "Hello", "--system", "Be brief.", *map(str, LIMIT), "-q"])
    assert (done.returncode, done.stdout, done.stderr) == (0, answer + "\n", "")


def test_details(attach: list[str]) -> None:
    done = run([*attach, "-p", "Hello", *map(str, LIMIT), "-v"])
    assert re.fullmatch(rf"{N} tokens, [\d.]+ tokens/s\ncut at max_tokens\n", done.stderr)


def test_a_conversation(endpoint: Endpoint, tiny: Path) -> None:
    """The whole screen of a conversation, with all that can go wrong in one that goes on."""
    first = expected(endpoint, "Hello")
    second = expected(endpoint, "Hello", first, "/think And?")
    long = "word " * 60
    script = [
        ("Hello\n", f"Hello\n{first}\ncut at max_tokens\n"),
        ("/think And?\n", f"/think And?\n{second}\ncut at max_tokens\n"),
        ("\n", "\n"),
        ("/rest\n", "/rest\nerror: unknown command /rest; /help lists them\n"),
        ("/edit 3\n", "/edit 3\nerror: question: got 3, expected a number from 1 to 2; /list shows them\n"),
        ("/list\n", "/list\n  1 Hello\n  2 /think And?\n"),
        (
            f"{long}\n",
            f"{long}\ncontext full (347 tokens): the 2 oldest exchanges are left out, the rest is read again\n"
            "error: context full: the question alone has 301 tokens, the server holds 256; a larger --ctx holds more\n",
        ),
        ("/undo\n", "/undo\nforgotten: /think And?\n"),
        ("/regen\n", f"/regen\n{first}\ncut at max_tokens\n"),
        ("/reset\n", "/reset\nthe conversation is forgotten\n"),
        ("/stats\n", "/stats\nerror: there is no answer yet\n"),
        ("Hello\n", f"Hello\n{first}\ncut at max_tokens\n"),
        ("half a li", "half a li"),
        ("\x03", "\nCtrl-D or /exit leaves\n"),
        ("\x04", "\n"),
    ]
    with Terminal(command("hy-chat", tiny, "--ctx", 256, *LIMIT)) as terminal:
        shown = f"loading {tiny}\nready (context 256)\n{INTRODUCTION}"
        for typed, answer in script:
            prompt = "" if typed == "\x03" else "> "
            terminal.expect(prompt, after=len(shown))
            terminal.type(typed)
            shown += prompt + answer
            terminal.expect(answer, after=len(shown) - len(answer))
        assert terminal.wait() == 0
    assert terminal.screen == shown


def test_saved_and_loaded_with_what_was_read(talkative: Path, tmp_path: Path) -> None:
    """Another hy-chat goes on without reading again; with another model's memory it reads again and says so."""
    kept = tmp_path / "talk.md"
    with Terminal(command("hy-chat", talkative, "-q", "--max-tokens", 200)) as terminal:
        terminal.expect("> ")
        terminal.type("word " * 50 + "\n")
        terminal.type(f"/save {kept}\n/exit\n")
        assert terminal.wait() == 0
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {
        "talk.md": 0o600,
        "talk.md.kv": 0o600,
    }
    with Terminal(command("hy-chat", talkative, "--max-tokens", 20, "--load", kept)) as terminal:
        terminal.expect("talk.md: 1 exchanges\ntalk.md.kv: ")
        at = terminal.expect("tokens need not be read again\n")
        terminal.type("And?\n")
        at = terminal.expect("cut at max_tokens\n", after=at)
        terminal.type("/stats\n/exit\n")
        assert terminal.wait() == 0
    known = re.search(r"(\d+) were known", terminal.screen)
    assert known
    assert int(known[1]) > 300
    with Terminal(command("hy-chat", talkative, "--max-tokens", 20)) as terminal:
        terminal.expect("> ")
        text = kept.read_text(encoding="utf-8")
        kept.write_text(re.sub('"sha256": "..', '"sha256": "zz', text), encoding="utf-8")
        terminal.type(f"/load {kept}\n")
        terminal.expect("talk.md.kv belongs to another model: ignored; the conversation is read again\n")
        kept.write_text(text, encoding="utf-8")
        (tmp_path / "talk.md.kv").write_bytes(b"nothing")
        terminal.type(f"/load {kept}\n")
        terminal.expect("talk.md.kv: ignored; the conversation is read again (the server refused: ")
        terminal.type("And?\n")
        terminal.expect("cut at max_tokens\n")
        terminal.type("/exit\n")
        assert terminal.wait() == 0


def test_an_attached_server_cannot_save_what_it_read(attach: list[str], tmp_path: Path) -> None:
    with Terminal([*attach, *map(str, LIMIT)]) as terminal:
        terminal.expect("> ")
        terminal.type(f"Hello\n/save {tmp_path}/talk.md\n/exit\n")
        assert terminal.wait() == 0
    assert "what the server has read is not: only a private server, of hy-chat MODEL.gguf, can" in terminal.screen
    assert [path.name for path in tmp_path.iterdir()] == ["talk.md"]


def test_one_json_object(endpoint: Endpoint, attach: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Some text.")
    done = run([*attach, "-p", "Hello", "--json", "-f", str(tmp_path / "a.txt"), *map(str, LIMIT), "-q"])
    answer = json.loads(done.stdout)
    with_file = expected(endpoint, "Hello\n\nFile a.txt:\n```txt\nSome text.\n```")
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)
    assert (answer["content"] + answer["reasoning_content"], answer["finish_reason"]) == (with_file, "length")
    assert answer["usage"]["completion_tokens"] == answer["timings"]["predicted_n"] == N


@pytest.fixture(scope="module")
def talkative(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with room for an answer of several seconds."""
    return write_model(tmp_path_factory.mktemp("model") / "talkative.gguf", template=fallback(), trained=16384)


def test_ctrl_c_stops_the_answer_and_not_the_program(talkative: Path) -> None:
    with Terminal(command("hy-chat", talkative, "-q", "--threads", 1)) as terminal:
        terminal.expect("> ")
        terminal.type("Talk!\n")
        terminal.expect("Talk!\n")
        wait_for_text(terminal, 30)
        terminal.type("\x03")
        at = terminal.expect("\n> ")
        terminal.type("/exit\n")
        assert terminal.wait() == 0
    assert re.fullmatch(r"> Talk!\n[a-z ]+\^C[a-z ]*\n> /exit\n", terminal.screen), terminal.screen
    assert at < 16000  # it had more to say


def test_ctrl_c_in_one_shot_is_status_130(talkative: Path) -> None:
    with Terminal(command("hy-chat", talkative, "-q", "-p", "Talk!", "--threads", 1)) as terminal:
        wait_for_text(terminal, 30)
        engine = engine_of(terminal.pid)
        terminal.type("\x03")
        assert terminal.wait() == 130
    assert re.fullmatch(r"[a-z ]+\^C[a-z ]*\n", terminal.screen)
    assert engine is not None
    assert not is_running(engine)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGKILL, -9)])
def test_a_signal_leaves_no_engine_behind(tiny: Path, number: signal.Signals, status: int) -> None:
    with Terminal(command("hy-chat", tiny)) as terminal:
        terminal.expect("> ")
        engine = engine_of(terminal.pid)
        os.kill(terminal.pid, number)
        assert terminal.wait() == status
    assert engine is not None
    assert ends(engine)


def test_an_engine_lost_between_two_questions(tiny: Path) -> None:
    with Terminal(command("hy-chat", tiny, "-q", *LIMIT)) as terminal:
        at = terminal.expect("> ")
        os.kill(engine_of(terminal.pid) or 0, signal.SIGKILL)
        terminal.type("Hello\n")
        terminal.expect("> ", after=at)
        terminal.type("\x04")
        assert terminal.wait() == 0
    assert re.fullmatch(r"> Hello\n[a-z]+\n> ", terminal.screen), terminal.screen


def test_a_server_of_somebody_else_is_waited_for(talkative: Path) -> None:
    """Lost in mid-answer: the question is asked again when the server is back."""
    options = ServerOptions(talkative, port=free_port("127.0.0.1"), threads=1)
    with ExitStack() as servers:
        endpoint = servers.enter_context(serve(options))
        with Terminal(command("hy-chat", "--url", endpoint.url, "--max-tokens", 3000)) as terminal:
            terminal.expect("> ")
            terminal.type("Talk!\n")
            wait_for_text(terminal, 30)
            servers.close()
            at = terminal.expect(f"lost the server at {endpoint.url}; the question waits until it is back\n")
            servers.enter_context(serve(options))
            terminal.expect("cut at max_tokens\n> ", after=at)
            terminal.type("/list\n/exit\n")
            assert terminal.wait() == 0
    assert "  1 Talk!\n" in terminal.screen


def test_an_engine_that_is_lost_in_one_shot(talkative: Path) -> None:
    with Terminal(command("hy-chat", talkative, "-q", "-p", "Talk!", "--threads", 1)) as terminal:
        wait_for_text(terminal, 30)
        os.kill(engine_of(terminal.pid) or 0, signal.SIGKILL)
        assert terminal.wait() == 1
    assert terminal.screen.endswith("\nerror: the engine stopped while serving: killed by SIGKILL\n")


def test_no_server_and_no_key(
    endpoint: Endpoint, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["--url", "127.0.0.1:9/v1/", "-p", "Hello"]) == 1
    assert capsys.readouterr().err == (
        "error: no server at http://127.0.0.1:9: got Connection refused; start one with hy-serve\n"
    )
    assert main(["--url", endpoint.url, "-p", "Hello"]) == 1
    line = f"error: {endpoint.url}: got no API key; set HYMOE_API_KEY to the server's\n"
    assert capsys.readouterr() == ("", line)
    monkeypatch.setenv("HYMOE_API_KEY", "wrong")
    assert main(["--url", endpoint.url, "-p", "Hello"]) == 1
    assert capsys.readouterr() == ("", line.replace("no API key", "a wrong API key"))


def test_a_prompt_that_is_none(attach: list[str]) -> None:
    empty = run([*attach, "-p", "-"], stdin=b" \n")
    assert (empty.returncode, empty.stdout) == (1, "")
    assert empty.stderr.startswith("error: stdin: got nothing, expected a prompt; ")
    binary = run(attach, stdin=b"ab\xff")
    assert (binary.returncode, binary.stderr) == (1, "error: stdin: got byte 0xff at 2, expected UTF-8 text\n")
    for flags, name in ((["-p", "a\udcff"], "--prompt"), (["-p", "a", "--system", "\udcff"], "--system")):
        argument = run([*attach, *flags])
        line = f"error: {name}: got bytes that are no UTF-8, expected UTF-8 text\n"
        assert (argument.returncode, argument.stderr) == (1, line)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-p", "x"], "give either MODEL.gguf or --url"),
        (["m.gguf", "--url", "x"], "give either MODEL.gguf or --url"),
        (["--url", "x", "--ctx", "5"], "--ctx, --threads, --router and --log belong to the server that --url names"),
    ],
)
def test_usage(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_json_of_no_prompt() -> None:
    with Terminal(command("hy-chat", "--url", "x", "--json")) as terminal:
        assert terminal.wait() == 2
    assert "--json needs a prompt" in terminal.screen


@pytest.mark.parametrize("given", ["localhost:8080", "http://localhost:8080/", "http://localhost:8080/v1"])
def test_addresses_people_paste(given: str) -> None:
    assert endpoint_from_url(given, None) == Endpoint("http://localhost:8080")


@pytest.mark.parametrize(
    ("host", "ours"),
    [
        *[(host, True) for host in ("localhost", "LocalHost", "127.0.0.1", "127.1.2.3", "::1")],
        *[(host, False) for host in ("localhost.example.com", "127.example.com", "::12", "::", "0.0.0.0", "")],
    ],
)
def test_loopback(host: str, ours: bool) -> None:
    assert is_loopback(host) is ours


@pytest.mark.parametrize("given", ["", "ftp://host", "http://", "host:port", "http://[::1"])
def test_addresses_that_are_none(given: str) -> None:
    with pytest.raises(ServerError, match=r"^--url: got .*expected something like http://127\.0\.0\.1:8080$"):
        endpoint_from_url(given, None)


SHOW = """
from hymoe.runtime.chat_plain import PlainDisplay
from hymoe.runtime.conversation import Answer
from hymoe.runtime.stream import Piece
screen = PlainDisplay()
screen.begin(Answer())
thought = ["hm", " \\x1b]0;x\\x07"]
answer = ["\\x1b[2Jyes", "\\n\\t你好\\n"]
for kind, text in [("thought", text) for text in thought] + [("text", text) for text in answer]:
    screen.show(Piece(kind, text), Answer())
screen.end(Answer())
"""


@pytest.mark.parametrize(
    ("env", "shown"),
    [
        ({"TERM": "xterm"}, "\x1b[2mhm\x1b[0m\x1b[2m ]0;x\x1b[0m\n\n[2Jyes\n\t你好\n"),
        ({"TERM": "xterm", "NO_COLOR": "1"}, "[thinking] hm ]0;x\n\n[2Jyes\n\t你好\n"),
    ],
    ids=["colour", "NO_COLOR"],
)
def test_thoughts_and_control_characters_on_a_terminal(env: dict[str, str], shown: str) -> None:
    with Terminal([sys.executable, "-c", SHOW], env=env) as terminal:
        assert terminal.wait() == 0
    assert terminal.screen == shown


def test_a_pipe_gets_the_answer_as_it_is() -> None:
    done = run([sys.executable, "-c", SHOW])
    assert (done.stdout, done.stderr) == ("\x1b[2Jyes\n\t你好\n", "")


def wait_for_text(terminal: Terminal, n: int) -> None:
    """Wait until `n` more characters are on the screen."""
    enough = len(terminal.screen) + n
    while len(terminal.screen) < enough:
        terminal.read()
