"""The engine room: llama.cpp, pinned, patched, built and found."""

from hymoe.engine.installed import Engine, find

__all__ = ["Engine", "find"]
