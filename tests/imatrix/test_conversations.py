"""Text in a model's template: nothing is lost, every turn has its tokens, and what is no conversation is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from hymoe import chat_templates
from hymoe.errors import UnsupportedError
from hymoe.imatrix import calibration, conversations
from hymoe.imatrix.conversations import Conversation, Source

LONG = "\n\n".join(" ".join(f"Sentence {i} of paragraph {p}." for i in range(p * 9)) for p in range(1, 12))


def squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)


def spoken(found: list[Conversation]) -> str:
    return squeezed("".join(message["content"] for each in found for message in each.messages))


@pytest.mark.parametrize("text", [LONG, LONG.replace("\n\n", " "), "长" * 9000, "one line", "\n\na\n\n\nb\n"])
def test_plain_text_is_cut_into_turns_and_nothing_is_lost(text: str) -> None:
    found = list(conversations.passages(text))
    assert spoken(found) == squeezed(text)
    sizes = [sum(len(message["content"]) for message in each.messages) for each in found]
    assert max(sizes) <= conversations.PASSAGE_CHARACTERS + 2
    for each in found[:-1]:
        user, assistant = each.messages
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert len(user["content"]) < len(assistant["content"])


def test_dialogues_keep_their_speakers() -> None:
    found = list(conversations.dialogues("User: Hi\nAssistant: Hello\n  there\n\n用户：你好\n助手：好"))
    assert [[(m["role"], m["content"]) for m in each.messages] for each in found] == [
        [("user", "Hi"), ("assistant", "Hello\n  there")],
        [("user", "你好"), ("assistant", "好")],
    ]


def test_files_take_turns() -> None:
    def source(name: str, n: int) -> Source:
        return Source(name, tuple(Conversation([{"role": "user", "content": f"{name}{i}"}]) for i in range(n)))

    text = conversations.rendered([source("a", 4), source("b", 2)], chat_templates.fallback())
    assert re.findall(r"[ab]\d", text) == ["a0", "b0", "a1", "a2", "b1", "a3"]


def test_the_calibration_set_has_every_kind_in_the_template() -> None:
    """Chinese, English, code, mathematics, tool calls and thoughts, with the tokens that a model meets around them."""
    sources = conversations.calibration_set()
    text = conversations.rendered(sources, chat_templates.fallback())
    n_conversations = sum(len(source.conversations) for source in sources)
    n_answers = sum(m["role"] == "assistant" for s in sources for c in s.conversations for m in c.messages)
    assert text.count("<|startoftext|>") >= n_conversations
    assert text.count("<|eos|>") == n_answers
    for tag in ("<think>\n", "</think>\n<answer>", "</answer>", "<tool_calls>[", "<tool_response>", "助手：", "用户："):
        assert text.count(tag) > 5, tag
    assert len(re.findall(r"[\u4e00-\u9fff]", text)) > 4000
    assert len(text) > 45_000
    kinds = {entry.kind for group in (calibration.texts(), calibration.conversations()) for entry in group}
    assert kinds >= {"prose", "code", "mathematics", "dialogue", "tool calls", "thinking"}


def test_the_manifest_is_true() -> None:
    entries = [*calibration.texts(), *calibration.conversations()]
    for entry in entries:
        assert len(entry.content.encode()) == entry.bytes, entry.file
        assert (entry.origin, entry.licence) == ("written for hymoe", "MIT")
    folder = Path(calibration.__file__).with_name("texts")
    assert {entry.file for entry in entries} == {file.name for file in folder.iterdir()} - {"manifest.json"}


def test_thoughts_survive_a_vendors_template_that_is_repaired() -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "reasoning_content": "hm", "content": "a"}]
    text = conversations.rendered([Source("x", (Conversation(messages),))], chat_templates.fallback())
    assert text == "<|startoftext|>q<|extra_0|><think>\nhm\n</think>\n<answer>\na\n</answer><|eos|>"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "x.jsonl, line 2: got no JSON"),
        ("3", "x.jsonl, line 2: got no conversation"),
        ("[]", "got no conversation, expected a JSON list of messages"),
        ('{"messages": [{"content": "a"}]}', "got a message without a role"),
        ('{"messages": "a"}', "got no conversation"),
        ("[" * 100000, "got no JSON"),
    ],
)
def test_lines_that_are_no_conversation(line: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps([{"role": "user", "content": "hello"}]) + "\n" + line + "\n")
    with pytest.raises(UnsupportedError) as caught:
        conversations.read(file)
    assert says in str(caught.value)


def test_a_line_of_json_may_hold_other_ends_of_lines(tmp_path: Path) -> None:
    said = "one\u2028two\u0085three"
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps([{"role": "user", "content": said}], ensure_ascii=False) + "\r\n", encoding="utf-8")
    (found,) = conversations.read(path).conversations
    assert found.messages == [{"role": "user", "content": said}]


def test_files_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UnsupportedError, match="got no UTF-8"):
        conversations.read(tmp_path / "binary.txt")
    with pytest.raises(UnsupportedError, match="Is a directory"):
        conversations.read(tmp_path)


def test_a_template_that_fails_is_one_line() -> None:
    source = Source("x", (Conversation([{"role": "user", "content": "q"}]),))
    with pytest.raises(UnsupportedError, match="chat template fails: got no; pass --no-template"):
        conversations.rendered([source], "{{ raise_exception('no') }}")
    with pytest.raises(UnsupportedError, match="chat template fails"):
        conversations.rendered([source], "{% if %}")
