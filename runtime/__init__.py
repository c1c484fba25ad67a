"""The runtime room: read a model file's head, run the engine's server, talk to it."""

from __future__ import annotations

from hymoe.runtime.endpoint import Endpoint
from hymoe.runtime.header import Header, peek
from hymoe.runtime.router import Router
from hymoe.runtime.server import Server, ServerOptions, serve

__all__ = ["Endpoint", "Header", "Router", "Server", "ServerOptions", "peek", "serve"]
