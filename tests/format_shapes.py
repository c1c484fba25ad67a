"""Outputs of HunYuan models as they were recorded or reported, and what a client must get for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple


class Call(NamedTuple):
    """A tool call: the function's name and its arguments as JSON text."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Shape:
    """One output.

    mode: "plain", "tools" or "no_calls" (tools that may not be called).
    begun: what the template has put before it (the generation prompt).
    """

    name: str
    text: str
    reasoning: str = ""
    content: str = ""
    calls: tuple[Call, ...] = ()
    mode: str = "plain"
    begun: str = ""

    def __str__(self) -> str:
        return self.name


FAST: Final = "<think>\n\n</think>\n"
OPENED: Final = "<think>\n"
_RAIN: Final = Call("get_weather", '{"city": "北京", "days": 3}')
_TIME: Final = Call("get_time", '{"zone": "Asia/Shanghai"}')
_RAIN_TEXT: Final = '{"name": "get_weather", "arguments": {"city": "北京", "days": 3}}'
_TIME_TEXT: Final = '{"name": "get_time", "arguments": {"zone": "Asia/Shanghai"}}'
_THOUGHT: Final = "<think>\nHm, 好的。\n</think>\n"


def _calls(
    name: str, text: str, *calls: Call, thought: str = _THOUGHT, content: str = "", mode: str = "tools"
) -> Shape:
    reasoning = "Hm, 好的。" if thought == _THOUGHT else ""
    return Shape(name, thought + text, reasoning, content, calls, mode)


# The vendor's own forms: its template, its parsers for vLLM, and what clients.md holds of the real model's output.
VENDOR: Final = (
    Shape("slow", "<think>\nHm.\nTwo lines.\n</think>\n<answer>\nYes, 好。\n</answer>", "Hm.\nTwo lines.", "Yes, 好。"),
    Shape("empty thought", "<think>\n\n</think>\n<answer>\nYes.\n</answer>", "", "Yes."),
    Shape("fast", "<answer>\nYes.\n</answer>", "", "Yes.", begun=FAST),
    Shape("fast without tags", "Yes.", "", "Yes.", begun=FAST),
    Shape("plain text", "Yes.\n\n- one\n- two", "", "Yes.\n\n- one\n- two"),
    Shape("thought opened in advance", "Hm.\n</think>\n<answer>\nYes.\n</answer>", "Hm.", "Yes.", begun=OPENED),
    _calls("call inside the answer", f"<answer>\n<tool_calls>[{_RAIN_TEXT}]</tool_calls>\n</answer>", _RAIN),
    _calls("call outside the answer", f"<tool_calls>[{_RAIN_TEXT}]</tool_calls>", _RAIN),
    _calls("call after an empty answer", f"<answer>\n</answer>\n<tool_calls>[{_RAIN_TEXT}]</tool_calls>", _RAIN),
    _calls("two calls", f"<answer>\n<tool_calls>[{_RAIN_TEXT}, {_TIME_TEXT}]</tool_calls>\n</answer>", _RAIN, _TIME),
    _calls("call without a thought", f"<tool_calls>[{_RAIN_TEXT}]</tool_calls>", _RAIN, thought=""),
    _calls("text before a call", f"<answer>\nI look.\n<tool_calls>[{_TIME_TEXT}]</tool_calls>\n</answer>", _TIME,
           content="I look."),
    _calls("call spread over lines", f"<answer>\n<tool_calls>\n[\n  {_TIME_TEXT},\n  {_RAIN_TEXT}\n]\n</tool_calls>",
           _TIME, _RAIN),
    _calls("plain reply in tool mode", "<answer>\n助手：It rains.\n</answer>", content="It rains."),
    _calls("plain reply without a thought", "助手：It rains.", content="It rains.", thought=""),
    _calls("plain reply with an ASCII colon", "助手: It rains.", content="It rains.", thought=""),
)  # fmt: skip

# Reported by users: users.md, section 1a.
REPORTED: Final = (
    Shape("thought closed by </answer>", "<think>\nHm.\n</answer>\nYes.", "Hm.", "Yes."),
    Shape("thought closed by </answer>, answer opened", "<think>\nHm.\n</answer>\n<answer>\nYes.\n</answer>", "Hm.", "Yes."),
    Shape("thought closed by both", "<think>\nHm.\n</answer>\n</think>\n<answer>\nYes.\n</answer>", "Hm.", "Yes."),
    Shape("thought closed by <answer>", "<think>\nHm.\n<answer>\nYes.\n</answer>", "Hm.", "Yes."),
    Shape("mumbling before the thought", "Okay.\n<think>\nHm.\n</think>\n<answer>\nYes.\n</answer>", "Hm.", "Okay.\nYes."),
    Shape("answer never closed", "<think>\nHm.\n</think>\n<answer>\nYes.", "Hm.", "Yes."),
    Shape("thought never closed", "<think>\nHm. And then", "Hm. And then", ""),
    Shape("end in a closing tag", "<think>\nHm.\n</thi", "Hm.\n</thi", ""),
    Shape("end in an opening tag", "<think>\nHm.\n</think>\n<ans", "Hm.", "<ans"),
    Shape("end after the thought", "<think>\nHm.\n</think>", "Hm.", ""),
    Shape("no newlines", "<think>Hm.</think><answer>Yes.</answer>", "Hm.", "Yes."),
    Shape("many newlines", "\n\n<think>\n\n\nHm.\n\n\n</think>\n\n\n<answer>\n\n\nYes.\n\n\n</answer>\n\n", "Hm.", "Yes."),
    Shape("Windows line ends", "<think>\r\nHm.\r\n</think>\r\n<answer>\r\nYes.\r\nNo.\r\n</answer>", "Hm.", "Yes.\r\nNo."),
    Shape("spaces around tags", " <think> Hm. </think> <answer> Yes. </answer> ", "Hm.", "Yes."),
    Shape("two thoughts", "<think>\nA\n</think>\n<think>\nB\n</think>\n<answer>\nYes.\n</answer>", "A\nB", "Yes."),
    Shape("answer twice", "<answer>\nOne.\n</answer>\n<answer>\nTwo.\n</answer>", "", "One.\nTwo."),
    Shape("closer without opener", "Hm.\n</think>\n<answer>\nYes.\n</answer>", "", "Hm.\nYes."),
    Shape("text after the answer", "<answer>\nYes.\n</answer>\nBye.", "", "Yes.\nBye."),
    Shape("user's own tags, nested", "<answer>\n<answer>42</answer>\n</answer>", "", "42"),
    _calls("call closes the thought", f"<tool_calls>[{_TIME_TEXT}]</tool_calls>", _TIME, thought="<think>\n"),
    _calls("call without its closing tag", f"<answer>\n<tool_calls>[{_RAIN_TEXT}]", _RAIN),
    _calls("call without brackets", f"<answer>\n<tool_calls>{_RAIN_TEXT}</tool_calls>\n</answer>", _RAIN),
    _calls("calls without comma", f"<tool_calls>[{_RAIN_TEXT}\n{_TIME_TEXT}]</tool_calls>", _RAIN, _TIME),
    _calls("a section each", f"<tool_calls>[{_RAIN_TEXT}]</tool_calls>\n<tool_calls>[{_TIME_TEXT}]</tool_calls>", _RAIN,
           _TIME),
    _calls("array never closed", f"<tool_calls>[{_RAIN_TEXT}</tool_calls>", _RAIN),
    _calls("object never closed", f"<tool_calls>[{_RAIN_TEXT[:-1]}]</tool_calls>", _RAIN),
    _calls("no calls", "<answer>\n<tool_calls>[]</tool_calls>\nDone.\n</answer>", content="Done."),
)  # fmt: skip

# What looks like a tag and is text, what looks like text and is a call.
EDGES: Final = (
    Shape("less-than signs", "a < b, a <b, <t, <think, </answ er> and <<think", "", "a < b, a <b, <t, <think, </answ er> and <<think"),
    Shape("other tags", "<answer>\n<b>Yes</b> <thinking>x</thinking>\n</answer>", "", "<b>Yes</b> <thinking>x</thinking>"),
    Shape("tag in a tag", "<answer>\n<th<think>ink>\n</answer>", "", "<th\nink>"),
    Shape("tags in a code block", "<answer>\n```\n<think>\nx</think>\n```\nDone.\n</answer>", "", "```\n<think>\nx</think>\n```\nDone."),
    Shape("tags in inline code", "<answer>\nWrite `<answer>` and `</answer>`.\n</answer>", "", "Write `<answer>` and `</answer>`."),
    Shape("code block never closed", "<answer>\n```py\nx = 1\n</answer>\n", "", "```py\nx = 1"),
    Shape("thought that speaks of tags", "<think>\nPut it in <answer> tags, `</think>` too.\n</think>\n<answer>\nYes.\n</answer>",
          "Put it in tags, `</think>` too.", "Yes."),
    Shape("answer that speaks of a tag", "<answer>\nThe <think> tag.\n</answer>", "", "The tag."),
    Shape("word of tool mode without tools", "助手：你好", "", "助手：你好"),
    Shape("calls without tools", f"<answer>\n<tool_calls>[{_TIME_TEXT}]</tool_calls>\n</answer>", "", f"[{_TIME_TEXT}]"),
    _calls("calls that may not be", f"<answer>\n助手：<tool_calls>[{_TIME_TEXT}]</tool_calls>\n</answer>",
           content=f"[{_TIME_TEXT}]", mode="no_calls"),
    _calls("word of tool mode later", "<answer>\nIt rains. 助手：x\n</answer>", content="It rains. 助手：x"),
    _calls("half of the word", "助", content="助", thought=""),
    _calls("tag in an argument", '<tool_calls>[{"name": "f", "arguments": {"x": "</tool_calls><think>"}}]</tool_calls>',
           Call("f", '{"x": "</tool_calls><think>"}')),
    _calls("brackets and quotes in an argument", '<tool_calls>[{"name": "f", "arguments": {"x": "}]\\"{", "y": [[1], {}]}}]</tool_calls>',
           Call("f", '{"x": "}]\\"{", "y": [[1], {}]}')),
    _calls("newline and stray backslash in an argument", '<tool_calls>[{"name": "f", "arguments": {"x": "a\nb\\d\\u12"}}]</tool_calls>',
           Call("f", '{"x": "a\\nb\\\\d\\\\u12"}')),
    _calls("arguments as text", '<tool_calls>[{"name": "f", "arguments": "{\\"x\\": \\"\\u597d\\ud83d\\ude00\\"}"}]</tool_calls>',
           Call("f", '{"x": "好😀"}')),
    _calls("arguments first", '<tool_calls>[{"arguments": {"x": 1}, "name": "f"}]</tool_calls>', Call("f", '{"x": 1}')),
    _calls("parameters", '<tool_calls>[{"name": "f", "parameters": {"x": 1}}]</tool_calls>', Call("f", '{"x": 1}')),
    _calls("no arguments", '<tool_calls>[{"name": "f"}, {"name": "g", "arguments": null}]</tool_calls>', Call("f", "{}"), Call("g", "{}")),
    _calls("other keys", '<tool_calls>[{"id": "a1", "name": "f", "type": {"a": 1}, "arguments": {}}]</tool_calls>', Call("f", "{}")),
    _calls("end in an argument", '<tool_calls>[{"name": "f", "arguments": {"x": "ab', Call("f", '{"x": "ab')),
    _calls("end in a name", '<tool_calls>[{"name": "f', content='[{"name": "f'),
    _calls("arguments cut by the closing tag", '<tool_calls>[{"name": "f", "arguments": {"x": 1</tool_calls>\nBye.',
           Call("f", '{"x": 1'), content="Bye."),
    _calls("no call at all", "<tool_calls>None needed.</tool_calls>", content="None needed."),
    _calls("text after a call", f"<tool_calls>[{_TIME_TEXT}] and more</tool_calls>", _TIME, content="and more"),
)  # fmt: skip

SHAPES: Final = VENDOR + REPORTED + EDGES
