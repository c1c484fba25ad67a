"""A worker for other machines: the engine's own RPC server, which offers this machine's devices over the network."""

from __future__ import annotations

import ipaddress
import os
import socket
from dataclasses import dataclass
from typing import Final, NoReturn

from hymoe import console
from hymoe.engine.installed import WAITING, engine_root, find
from hymoe.errors import EngineError

PORT: Final = 50052  # llama.cpp's own choice
TRUST: Final = "it has no key and no encryption, and whoever reaches it can take over this process"


@dataclass(frozen=True)
class WorkerOptions:
    """Where to listen and what to offer.

    devices: names as `hy-engine info` lists them; none for all GPUs, or the processor where there are none.
    threads: of the processor as a device; None for half of the cores. cache: keep the tensors that are sent, so that
    the same model comes from this machine's disk the next time.
    """

    host: str = "127.0.0.1"
    port: int = PORT
    devices: tuple[str, ...] = ()
    threads: int | None = None
    cache: bool = False


def serve(options: WorkerOptions) -> NoReturn:
    """Become the worker: this process runs it from here on, and ends with it.

    Raises EngineError where no engine is built, or the address cannot be listened on.
    """
    tool = find().tool("ggml-rpc-server")
    _check_address(options.host, options.port)
    where = f"{options.host}:{options.port}"
    if ipaddress.IPv4Address(options.host).is_loopback:
        console.status(f"worker on {where}: {TRUST}; other machines reach it through a tunnel only")
    else:
        console.warn(f"worker on {where}: {TRUST}: a private network or a tunnel only, never the internet")
    console.status(f"use it with: hy-serve MODEL.gguf --rpc {where}")
    # Where llama.cpp keeps the tensors is beside the engines, not in a folder of its own.
    environment = {**WAITING, **os.environ, "LLAMA_CACHE": str(engine_root().parent)}
    os.execve(tool, command_line(str(tool), options), environment)


def command_line(tool: str, options: WorkerOptions) -> list[str]:
    """Give the worker's command."""
    command = [tool, "--host", options.host, "--port", str(options.port)]
    command += ["--device", ",".join(options.devices)] if options.devices else []
    command += ["--threads", str(options.threads)] if options.threads is not None else []
    return command + (["--cache"] if options.cache else [])


def _check_address(host: str, port: int) -> None:
    try:
        ipaddress.IPv4Address(host)
    except ValueError:
        raise EngineError("--host", got=host, expected="an IPv4 address of this machine, or 0.0.0.0 for all") from None
    try:
        socket.create_server((host, port)).close()
    except OSError as exc:
        # Not strerror: Python appends the address to it.
        reason = os.strerror(exc.errno) if exc.errno else exc
        raise EngineError(f"{host}:{port} cannot be listened on", got=reason) from exc
