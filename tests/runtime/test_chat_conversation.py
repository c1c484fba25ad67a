"""Conversations as data: edits, what is left out, files, settings, and the saved form."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tiny_model import write_model

from hymoe.errors import HyError
from hymoe.runtime import transcript
from hymoe.runtime.attachments import MAX_BYTES, mentioned, read_file
from hymoe.runtime.chat_input import open_history
from hymoe.runtime.conversation import Answer, Attachment, Conversation, Exchange, fenced
from hymoe.runtime.hosts import identity
from hymoe.runtime.router import Router
from hymoe.runtime.server import ServerOptions
from hymoe.runtime.settings import SETTINGS, Settings
from hymoe.runtime.transcript import Transcript, dumps, loads


def talk(*pairs: tuple[str, str], system: str | None = None) -> Conversation:
    conversation = Conversation(system)
    conversation.exchanges = [Exchange(question, (), Answer(text=answer)) for question, answer in pairs]
    return conversation


def contents(conversation: Conversation, question: str) -> list[str]:
    return [message["content"] for message in conversation.messages(question)]


def test_what_is_sent() -> None:
    conversation = talk(("a", "A"), ("b", ""), ("c", "C"), system="S")
    conversation.exchanges[0].answer.thought = "never sent again"
    # b was stopped before its answer began.
    assert contents(conversation, "d") == ["S", "a", "A", "c", "C", "d"]
    assert [message["role"] for message in conversation.messages("d")][:3] == ["system", "user", "assistant"]
    conversation.n_left_out = 1
    assert contents(conversation, "d") == ["S", "c", "C", "d"]


def test_rewinding_keeps_what_is_left_out_in_bounds() -> None:
    conversation = talk(("a", "A"), ("b", "B"), ("c", "C"))
    conversation.n_left_out = 2
    assert [exchange.question for exchange in conversation.rewind(2)] == ["b", "c"]
    assert (len(conversation.exchanges), conversation.n_left_out) == (1, 1)
    conversation.reset()
    assert contents(conversation, "d") == ["d"]


@pytest.mark.parametrize(("room", "left_out"), [(1000, 1), (76, 1), (75, 2), (52, 2), (51, 3), (1, 4)])
def test_the_oldest_are_left_out(room: int, left_out: int) -> None:
    """100 bytes count as 100 tokens: four exchanges of 24 bytes and a question of 4."""
    conversation = talk(*[("q" * 12, "a" * 12)] * 4)
    assert conversation.leave_out("last", (), 100, room) == left_out
    assert conversation.n_left_out == left_out
    assert len(conversation.exchanges) == 4


def test_nothing_left_to_leave_out() -> None:
    assert Conversation("system").leave_out("question", (), 100, 1) == 0


@pytest.mark.parametrize("text", ["plain", "```\ncode\n```\n", "a ```` b", ""])
def test_a_fence_is_longer_than_any_inside(text: str) -> None:
    first, *middle, last = fenced(Attachment("a.py", text)).split("\n")
    assert first == f"{last}py"
    assert last not in text
    assert "\n".join(middle) == text.removesuffix("\n")


def test_mentions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "with space.md", "名字.txt"):
        (tmp_path / name).write_text(f"in {name}\n")
    question = 'See @a.txt, @"with space.md" and（@名字.txt）; mail me@a.txt or @nobody! And @a.txt again.'
    files, missing = mentioned(question)
    assert [file.name for file in files] == ["a.txt", "with space.md", "名字.txt"]
    assert files[0].text == "in a.txt\n"
    assert missing == ["nobody"]


def test_files_that_cannot_be_sent(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b"x" * (MAX_BYTES + 1))
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "binary").write_bytes(b"GGUF\0\0")
    for name, reason in (
        ("large", "expected at most 4.2 MB of text"),
        ("latin", "no UTF-8"),
        ("binary", "got a binary file"),
        ("absent", "No such file or directory"),
        (".", "Is a directory"),
    ):
        with pytest.raises(HyError, match=reason):
            read_file(str(tmp_path / name))
    with pytest.raises(HyError, match="got a binary file"):
        read_file("/dev/zero")
    (tmp_path / "windows").write_bytes(b"\xef\xbb\xbfa\r\nb")
    assert read_file(str(tmp_path / "windows")).text == "a\nb"


def test_settings() -> None:
    settings = Settings()
    assert settings.fields() == {}
    settings.set("top_p", "0.5")
    settings.set("top_k", "7")
    settings.set_thinking("budget 100")
    thinking = {"chat_template_kwargs": {"enable_thinking": True}, "thinking_budget_tokens": 100}
    assert settings.fields() == {"top_p": 0.5, "top_k": 7, **thinking}
    settings.set("top_p", "default")
    settings.set_thinking("off")
    assert settings.fields() == {"top_k": 7, "chat_template_kwargs": {"enable_thinking": False}}
    [line] = [line for line in settings.lines({"top_k": 20, "top_p": 0.8}) if line.startswith("top_k")]
    assert line.split()[1] == "7*"


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("top_q", "1", f"/set top_q: got an unknown name, expected one of {', '.join(SETTINGS)}"),
        ("top_p", "1.5", "/set top_p: got 1.5, expected a number from 0 to 1, or default"),
        ("top_k", "1.5", "/set top_k: got 1.5, expected a whole number from 0 to 1e+06, or default"),
        ("temperature", "nan", "/set temperature: got nan, expected a number from 0 to 100, or default"),
    ],
)
def test_settings_that_are_none(name: str, value: str, line: str) -> None:
    with pytest.raises(HyError) as caught:
        Settings().set(name, value)
    assert str(caught.value) == line


@pytest.mark.parametrize("words", ["", "maybe", "budget", "budget -1", "budget x", "on off"])
def test_thinking_that_is_none(words: str) -> None:
    with pytest.raises(HyError, match="expected on, off, budget N or default"):
        Settings().set_thinking(words)


def same(one: Conversation, other: Conversation) -> bool:
    def told(conversation: Conversation) -> object:
        return [
            (one.question, one.files, one.answer.text, one.answer.thought, one.answer.reason)
            for one in conversation.exchanges
        ]

    return (one.system, one.n_left_out, told(one)) == (other.system, other.n_left_out, told(other))


SOUP = [
    *(
        "<!-- user -->",
        "<!-- assistant -->",
        '<!-- file "x" -->',
        "\\<!-- user -->",
        "<!-- hy-chat",
        "-->",
        "\\",
        "```",
    ),
    *("\n", "\n\n", "\r", "\r\n", " ", "a", "你好", "\u2028", "\x0c", "\x85", "# x", ""),
]


def test_saved_and_loaded_byte_for_byte() -> None:
    random_ = random.Random(5)

    def text() -> str:
        return "".join(random_.choice(SOUP) for _ in range(random_.randrange(9)))

    for _ in range(500):
        conversation = Conversation(random_.choice([None, text()]))
        for _ in range(random_.randrange(4)):
            files = tuple(Attachment(text() or "n", text()) for _ in range(random_.randrange(3)))
            answer = Answer(text=text(), thought=text(), reason=random_.choice(["stop", "stopped"]))
            conversation.exchanges.append(Exchange(text(), files, answer))
        conversation.n_left_out = random_.randrange(len(conversation.exchanges) + 1)
        settings = {"model": {"name": text()}, "think": "on", "sampling": {"top_p": 0.5}}
        again = loads(dumps(Transcript(conversation, dict(settings))), "x")
        assert same(again.conversation, conversation)
        assert again.settings == settings


def test_a_saved_conversation_can_be_read_by_people(tmp_path: Path) -> None:
    conversation = talk(("Hello", "**Hi** there"), system="Be brief.")
    conversation.exchanges[0].answer.reason = "stop"
    transcript.write(tmp_path / "a.md", Transcript(conversation, {"think": "default"}))
    assert (tmp_path / "a.md").read_text() == (
        "<!-- hy-chat conversation, version 1 -->\n"
        '<!-- settings {"think": "default", "left_out": 0} -->\n\n'
        "<!-- system -->\nBe brief.\n\n<!-- user -->\nHello\n\n"
        '<!-- assistant {"reason": "stop"} -->\n**Hi** there\n'
    )


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "x: got no conversation"),
        ("# Something else\n", "x: got no conversation"),
        ("<!-- hy-chat conversation, version 2 -->\n", "x: got version 2, expected version 1"),
        ("<!-- hy-chat conversation, version 1 -->\n<!-- assistant -->\nHi\n", "x: part 'assistant'"),
        ("<!-- hy-chat conversation, version 1 -->\n<!-- settings [1] -->\n", "x: part 'settings'"),
        ("<!-- hy-chat conversation, version 1 -->\n<!-- settings {no -->\n", "x: part 'settings'"),
        (f"<!-- hy-chat conversation, version {'9' * 5000} -->\n", "x: got version 9{20}, expected"),
        (f"<!-- hy-chat conversation, version 1 -->\n<!-- settings {'[' * 100000} -->\n", "x: part 'settings'"),
        ("<!-- hy-chat conversation, version 1 -->\n<!-- user -->\na\n\n<!-- file 5 -->\nb\n", "x: part 'file'"),
        (
            '<!-- hy-chat conversation, version 1 -->\n<!-- user -->\na\n\n<!-- file "\\ud800" -->\nb\n',
            "x: part 'file'",
        ),
        (
            '<!-- hy-chat conversation, version 1 -->\n<!-- user -->\na\n\n<!-- thought {"tokens": Infinity} -->\nb\n',
            "x: part 'thought'",
        ),
    ],
)
def test_files_that_are_no_conversation(text: str, line: str) -> None:
    with pytest.raises(HyError, match=line):
        loads(text, "x")


@pytest.mark.parametrize("sampling", [[1], "x", {"top_q": 1}, {"top_p": []}])
def test_settings_of_a_file_that_are_none(sampling: object) -> None:
    with pytest.raises(HyError):
        Settings.restored({"sampling": sampling}, "x")


def test_options_outdo_what_was_saved() -> None:
    settings = Settings.restored({"sampling": {"top_p": 0.5, "top_k": 3}, "think": "budget 7"}, "x")
    settings.take(Settings({"top_k": 4}))
    assert (settings.values, settings.thinking()) == ({"top_p": 0.5, "top_k": 4}, "budget 7")
    settings.take(Settings(think=False))
    assert settings.thinking() == "off"


def test_saving_replaces_a_conversation_and_nothing_else(tmp_path: Path) -> None:
    path, other = tmp_path / "a.md", tmp_path / "main.c"
    other.write_text("int main;")
    other_mode = other.stat().st_mode
    transcript.write(path, Transcript(talk(("a", "A")), {}))
    path.chmod(0o644)
    transcript.write(path, Transcript(talk(("b\udcff", "B")), {}))
    assert transcript.read(path).conversation.exchanges[0].question == "b?"
    assert path.stat().st_mode & 0o777 == 0o600
    for taken in (other, tmp_path, Path("/")):
        with pytest.raises(HyError, match="is there, and no conversation"):
            transcript.write(taken, Transcript(talk(("a", "A")), {}))
    assert (other.read_text(), other.stat().st_mode) == ("int main;", other_mode)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.md", "main.c"]


def test_loading_what_has_no_end_or_is_a_model(tmp_path: Path) -> None:
    with pytest.raises(HyError, match="a device or a pipe"):
        transcript.read(Path("/dev/zero"))
    with (tmp_path / "model.gguf").open("wb") as file:
        file.truncate(transcript.MAX_BYTES + 1)
    with pytest.raises(HyError, match=f"got {transcript.MAX_BYTES + 1} bytes"):
        transcript.read(tmp_path / "model.gguf")


def test_names_of_files_that_no_request_could_carry(tmp_path: Path) -> None:
    (tmp_path / "a\n\x1b[2J\udcff.txt").write_text("x")
    assert read_file(str(tmp_path / "a\n\x1b[2J\udcff.txt")).name == "a [2J?.txt"
    with pytest.raises(HyError, match="cannot read"):
        read_file("~nobody-of-this-name/x")


def test_what_a_memory_depends_on(tmp_path: Path) -> None:
    """Each part of a split model counts, and how tokens are routed."""
    parts = [tmp_path / f"m-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    write_model(parts[0])
    for part in parts[1:]:
        part.write_bytes(b"weights of another part")
    found = [identity(ServerOptions(parts[0], router=router)) for router in (None, Router("topk"), Router("capacity"))]
    assert found[0] == found[1] != found[2]
    assert len(found[0]["bytes"]) == 3
    parts[2].write_bytes(b"weights of a third part")
    assert identity(ServerOptions(parts[0])) != found[0]


def test_what_is_typed_is_kept_for_its_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    file = tmp_path / "hymoe" / "chat-history"
    file.parent.mkdir()
    file.touch(mode=0o644)
    history = open_history()
    for line in ("kept", " a secret", "x" * 100_000, "bytes \udcff"):
        history.append_string(line)
    assert file.stat().st_mode & 0o777 == 0o600
    assert [line[1:] for line in file.read_text().splitlines() if line.startswith("+")] == ["kept", "bytes ?"]
    assert len(history.get_strings()) == 4  # of this run
    file.unlink()
    file.mkdir()
    history.append_string("the disk is full")
