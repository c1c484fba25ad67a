"""The engine room: llama.cpp, pinned, patched, built and found."""

from hymoe.engine.installed import WAITING, Engine, find

__all__ = ["WAITING", "Engine", "find"]
