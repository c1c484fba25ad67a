"""docs/clients.md: what it shows works as it stands there."""

from __future__ import annotations

import contextlib
import io
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

from scripted_model import Script, cut, write_scripted

from hymoe.chat_templates import fallback, render
from hymoe.runtime.server import ServerOptions, serve

DOCS = Path(__file__).resolve().parents[2] / "docs"


def page() -> str:
    return (DOCS / "clients.md").read_text(encoding="utf-8")


def test_the_python_snippet(llama_server: Path, tmp_path: Path) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", page(), re.DOTALL)
    said = "Short waves scatter most."
    model = write_scripted(tmp_path / "model.gguf", [Script(cut(said))], template=fallback())
    out = io.StringIO()
    with serve(ServerOptions(model, port=0, threads=1)) as endpoint, contextlib.redirect_stdout(out):
        exec(compile(snippet.replace("http://127.0.0.1:8080", endpoint.url), "clients.md", "exec"), {})
    assert out.getvalue() == f"{said}\n"


def test_mikupads_instruct_template_makes_the_templates_prompts() -> None:
    """As mikupad joins them: prefix, text, suffix; the prefix of the first turn ends an answer that is not there."""
    entries = json.loads((DOCS / "mikupad-hunyuan.json").read_text(encoding="utf-8"))
    turns = ["U1", "A1", "U2", "A2", "U3"]
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    for name, entry in entries.items():
        thinking: dict[str, Any] = {"enable_thinking": False} if "no thinking" in name else {}
        first = f"{entry['instPre']}U1{entry['instSuf']}"
        assert first.removeprefix("<|eos|>") == render(fallback(), messages[:1], **thinking)
        system = f"{entry['sysPre']}S{entry['sysSuf']}{first}"
        wanted = render(fallback(), [{"role": "system", "content": "S"}, messages[0]], **thinking)
        assert system.replace("<|extra_4|><|eos|><|startoftext|>", "<|extra_4|>") == wanted
        if not thinking:
            joined = (
                f"{entry['instPre']}{text}{entry['instSuf']}" if i % 2 == 0 else text for i, text in enumerate(turns)
            )
            assert "".join(joined).removeprefix("<|eos|>") == render(fallback(), messages)


def test_each_client_is_told_in_five_lines_and_what_was_tried() -> None:
    sections = re.split(r"^## ", page(), flags=re.MULTILINE)[1:-1]
    assert [section.split("\n", 1)[0] for section in sections] == [
        "Any OpenAI client",
        "mikupad",
        "Open WebUI",
        "SillyTavern",
    ]
    for section in sections:
        assert "*Tried*: " in section
        numbers = [int(n) for n in re.findall(r"^(\d)\. ", section, re.MULTILINE)]
        assert numbers in ([], [1, 2, 3, 4, 5])
        assert all(after == before + 1 for before, after in pairwise(numbers))
