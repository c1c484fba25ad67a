"""Chat templates: our plain fallback, and rendering as the vendor's own stack renders."""

from __future__ import annotations

from hymoe.chat_templates.render import fallback, render

__all__ = ["fallback", "render"]
