"""Render a chat template to the text that transformers' `apply_chat_template` gives.

The environment is the one in transformers' `utils/chat_template_utils.py`: immutable sandbox, `trim_blocks`,
`lstrip_blocks`, loop controls, a `tojson` that keeps Chinese as it is, `raise_exception`, `strftime_now`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hymoe.errors import UnsupportedError

if TYPE_CHECKING:
    from jinja2 import Environment, Template

FALLBACK = Path(__file__).with_name("hunyuan.jinja")


def fallback() -> str:
    """Give the text of our own HunYuan template, for models that come without one."""
    return FALLBACK.read_text(encoding="utf-8")


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    now: datetime | None = None,
    **variables: object,
) -> str:
    """Render `messages` (OpenAI form) with the text of a jinja `template`.

    `variables` are what a caller of `apply_chat_template` adds, such as `enable_thinking=False`; `now` fixes what
    `strftime_now` says. What the template refuses raises jinja2's own TemplateError or SecurityError.
    """
    values: dict[str, object] = {"documents": None, "add_generation_prompt": False, **variables}
    return _compiled(template, now).render(messages=messages, tools=tools, **values)


@lru_cache(maxsize=16)
def _compiled(template: str, now: datetime | None) -> Template:
    return _environment(now).from_string(template)


def _environment(now: datetime | None) -> Environment:
    try:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as exc:
        raise UnsupportedError("rendering a chat template needs jinja2", fix="pip install jinja2") from exc

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def strftime_now(form: str) -> str:
        return (now or datetime.now()).strftime(form)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML characters, which a prompt must keep.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
