"""Chat templates: repairs of the vendors', our plain fallback, and rendering as the vendor's own stack renders."""

from __future__ import annotations

from hymoe.chat_templates.render import fallback, render
from hymoe.chat_templates.repairs import REPAIRS, Repaired, repair

__all__ = ["REPAIRS", "Repaired", "fallback", "render", "repair"]
