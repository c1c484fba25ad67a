"""A scripted model for tests of the API: it answers, thinks, calls a tool, counts without end, halves a character."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from scripted_model import NEWLINE, STOP_2, Script, cut, write_scripted

from hymoe.chat_templates import fallback

THOUGHT, REPLY = "The user says hello.", "Hello! 你好。"
HELLO = f"<think>\n{THOUGHT}\n</think>\n<answer>\n{REPLY}\n</answer>"
# What a prompt holds -> what the model says then. Later ones outdo earlier ones.
SAYS: Mapping[str, str] = {
    "weather": "It rains.",
    "addition": (
        "<think>\nI add.\n</think>\n<answer>\n"
        '<tool_calls>[{"name": "add", "arguments": {"a": 17, "b": 25}}]</tool_calls>\n</answer>'
    ),
    "answered": "<think>\nIt is known.\n</think>\n<answer>\n助手：The sum is 42.\n</answer>",
    "tagged": "<think>\n1 < 2 but\n\nno </b>\n</think>\n<answer>\n\n3 <4, 5</i> \n  <ans  </answer>\n",
    "turning": '<think>\nWhich?\n</think>\n<answer>\n{"side": "left"}\n</answer>',
}
# What follows a thought that the template or a budget has closed.
BUDGETED = "Fast reply"
# The word for an object in JSON, and what its only field may be.
SHORT, SIDES = "turning", ["left", "right"]
# Tokens of context that it takes long to count through.
ENDLESS = 262144
# Deterministic, and with the vendor's repetition penalty over the whole context.
SAMPLING = (("temp", 0.0), ("penalty_repeat", 1.05), ("penalty_last_n", -1))


def write_talker(
    path: Path, template: str | None = None, sampling: Sequence[tuple[str, float]] = SAMPLING, trained: int = 4096
) -> Path:
    """Write the model, with our template unless another is given."""
    scripts = [Script(pieces := cut(HELLO))]
    taken = {str(piece) for piece in pieces}
    for size, (marker, text) in enumerate(SAYS.items(), 5):  # texts that are cut otherwise share fewer pieces
        pieces = cut(text, size, frozenset(taken))
        taken |= set(pieces)
        scripts.append(Script(pieces, when=marker, stop=STOP_2 if marker == "weather" else "<|eos|>"))
    scripts += [
        Script(["Fast", " reply"], after=NEWLINE),
        Script(["one", " two"], when="count", then="one", doubts={" two": " deux"}),
        Script(["ab", "cd", "ef"], when="alphabet"),
        Script(["x", b"\xe4\xbd", b"\xa0!"], when="halves"),
    ]
    return write_scripted(path, scripts, template=template or fallback(), sampling=sampling, trained=trained)
