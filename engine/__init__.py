"""The engine room: llama.cpp, pinned, patched, built and found."""

from hymoe.engine.installed import IGNORED_VARIABLES, WAITING, Engine, environment, find

__all__ = ["IGNORED_VARIABLES", "WAITING", "Engine", "environment", "find"]
