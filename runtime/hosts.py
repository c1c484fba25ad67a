"""Who runs the server of a conversation: we do, privately, or somebody else does."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import secrets
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from hymoe.errors import HyError, OutputError
from hymoe.runtime import header
from hymoe.runtime.client import Client, LostServerError
from hymoe.runtime.endpoint import Endpoint
from hymoe.runtime.server import Server, ServerExitError, ServerOptions

# A connection breaks a moment before its process can be seen to have ended.
REAP_SECONDS = 1.0
RECONNECT_SECONDS = 120.0
POLL_SECONDS = 0.25
PRIVATE_ARGUMENTS = ("--no-ui", "--parallel", "1")
_SAMPLE_BYTES = 1 << 20


class AttachedHost:
    """A server that runs already: we can wait for it to come back, and no more."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.client = Client(endpoint)
        self.n_ctx: int | None = None
        self.model: dict[str, Any] = {}
        self.defaults: dict[str, Any] = {}
        self.is_llama_server = False

    async def learn(self) -> None:
        """Ask the server what it is. Raises LostServerError where there is none."""
        props = await self.client.props()
        generation = props.get("default_generation_settings")
        self.is_llama_server = isinstance(generation, dict)
        if isinstance(generation, dict):
            n_ctx, params = generation.get("n_ctx"), generation.get("params")
            self.n_ctx = n_ctx if isinstance(n_ctx, int) and n_ctx > 0 else None
            self.defaults = params if isinstance(params, dict) else {}

    async def recover(self, say: Callable[[str], None]) -> None:
        """Wait until the server answers again. Raises LostServerError where it does not."""
        say(f"lost the server at {self.client.endpoint.url}; the question waits until it is back")
        begun = time.monotonic()
        while not await self.client.is_healthy():
            if time.monotonic() - begun > RECONNECT_SECONDS:
                raise LostServerError(f"no server at {self.client.endpoint.url}", fix="start it and ask again")
            await asyncio.sleep(POLL_SECONDS)

    async def save_kv(self, path: Path) -> int:
        """Refuse: what another server has read is in its own folder."""
        raise HyError("only a private server, of hy-chat MODEL.gguf, can")

    async def load_kv(self, path: Path) -> int:
        """Refuse, likewise."""
        raise HyError("only a private server, of hy-chat MODEL.gguf, can")


class PrivateHost(AttachedHost):
    """A server of our own, started again when it is lost. Enter it with `private`."""

    def __init__(self, server: Server, options: ServerOptions, keeper: Keeper, slots: Path) -> None:
        super().__init__(server.endpoint)
        self._server = server
        self._options = options
        self._keeper = keeper
        self._slots = slots
        self.n_ctx = server.n_ctx
        self.model = identity(options)

    def explain(self) -> None:
        """Say how the server ended, if it did: raises ServerExitError then."""
        deadline = time.monotonic() + REAP_SECONDS
        while time.monotonic() < deadline:
            self._server.check()
            time.sleep(POLL_SECONDS / 4)

    async def recover(self, say: Callable[[str], None]) -> None:
        """Start the server again where it ended, else wait for it."""
        try:
            await asyncio.to_thread(self.explain)
        except ServerExitError as exc:
            say(f"{exc}; the question waits until it is started again")
        else:
            await super().recover(say)
            return
        self._server = await asyncio.wrap_future(self._keeper.start(self._options))
        await self.client.move(self._server.endpoint)

    async def save_kv(self, path: Path) -> int:
        """Let the server write beside the conversation."""
        try:
            # Private from its first byte: the server would make it as readable as any file.
            path.touch(mode=0o600)
            path.chmod(0o600)
            with self._linked(path) as name:
                answer = await self.client.slot("save", name)
        except OSError as exc:
            raise OutputError(f"{path.name}: cannot write", got=exc.strerror or exc) from exc
        except BaseException:
            # What is half written belongs to no conversation.
            path.unlink(missing_ok=True)
            raise
        return int(answer.get("n_saved") or 0)

    async def load_kv(self, path: Path) -> int:
        """Let the server read what it wrote."""
        with self._linked(path) as name:
            answer = await self.client.slot("restore", name)
        return int(answer.get("n_restored") or 0)

    @contextmanager
    def _linked(self, path: Path) -> Iterator[str]:
        """Give a name in the server's own folder, all that it accepts, for a file of gigabytes elsewhere."""
        link = self._slots / secrets.token_hex(8)
        link.symlink_to(path.absolute())
        try:
            yield link.name
        finally:
            link.unlink()


class Keeper:
    """Starts servers on a thread that lives as long as they do: the kernel ends a child with the thread it is from."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "server")
        self._stack = ExitStack()

    def start(self, options: ServerOptions) -> Future[Server]:
        """Start a server in place of the one before; give the future."""
        return self._thread.submit(self._start, options)

    def stop(self) -> None:
        """Stop the server."""
        self._stack.close()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _start(self, options: ServerOptions) -> Server:
        self._stack.close()
        return self._stack.enter_context(Server(options))


@asynccontextmanager
async def attached(endpoint: Endpoint) -> AsyncIterator[AttachedHost]:
    """Use a server that runs already."""
    host = AttachedHost(endpoint)
    async with host.client:
        yield host


@asynccontextmanager
async def private(server: Server, options: ServerOptions, slots: Path) -> AsyncIterator[PrivateHost]:
    """Use `server`, which runs; should it be lost, another with the same options takes its place."""
    keeper = Keeper()
    host = PrivateHost(server, options, keeper, slots)
    try:
        async with host.client:
            yield host
    finally:
        keeper.stop()


@contextmanager
def slot_folder() -> Iterator[Path]:
    """Give a folder of our own for the server's links, gone at the end."""
    with tempfile.TemporaryDirectory(prefix="hymoe-") as folder:
        yield Path(folder)


def private_options(options: ServerOptions, slots: Path) -> ServerOptions:
    """Make a server private: a free port and a random key, since any page in a browser could talk to an open one."""
    extra = (*PRIVATE_ARGUMENTS, "--slot-save-path", str(slots), *options.extra)
    return replace(options, port=0, api_key=secrets.token_urlsafe(32), extra=extra)


def identity(options: ServerOptions) -> dict[str, Any]:
    """Say what the memory of a server depends on: the model's file, or files, and how its tokens are routed."""
    router = options.router or header.peek(options.model).scalars.get("hunyuan-moe.router.mode", "topk")
    return {**fingerprint(options.model), "router": str(router)}


def fingerprint(model: Path) -> dict[str, Any]:
    """Tell a model from others without reading all of it: the size of each part, and a hash of every part's ends."""
    sizes, ends = [], hashlib.sha256()
    for part in parts(model):
        sizes.append(part.stat().st_size)
        with part.open("rb") as file:
            ends.update(file.read(_SAMPLE_BYTES))
            file.seek(max(sizes[-1] - _SAMPLE_BYTES, 0), os.SEEK_SET)
            ends.update(file.read(_SAMPLE_BYTES))
    return {"name": model.name, "bytes": sizes, "sha256": ends.hexdigest()[:32]}


def parts(model: Path) -> list[Path]:
    """Give the files of a model: those beside a first part `NAME-00001-of-00004.gguf` too, as far as they are there."""
    found = re.fullmatch(r"(.*)-00001-of-(\d{5})\.gguf", model.name)
    if found is None:
        return [model]
    names = [f"{found[1]}-{number:05}-of-{found[2]}.gguf" for number in range(2, int(found[2]) + 1)]
    return [model, *(part for name in names if (part := model.with_name(name)).is_file())]
