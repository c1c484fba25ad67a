"""Run a server in the foreground: what `hy-serve` does between its options and its exit status."""

from __future__ import annotations

from hymoe import console
from hymoe.runtime.endpoint import is_loopback
from hymoe.runtime.process import Terminated, signals_as_exceptions
from hymoe.runtime.router import mean_experts
from hymoe.runtime.server import DEFAULT_CTX, Server, ServerExitError, ServerOptions


def supervise(options: ServerOptions) -> int:
    """Serve until a signal or the engine's own end; give the exit status.

    Ctrl-C, SIGTERM and SIGHUP stop a healthy engine in order, and its status (0) is passed on; before it is healthy
    they give 128 + the signal. An engine that ends by itself passes on its status. Raises as `Server` does.
    """
    with signals_as_exceptions():
        try:
            return _serve(options)
        except ServerExitError as exc:
            show_exit(exc)
            return exc.status


def show_exit(exc: ServerExitError) -> None:
    """Show how the engine ended, after the last lines of its log (which -v has shown already)."""
    for line in exc.tail if not console.is_verbose() else []:
        console.status(f"  | {line}")
    console.error(str(exc))


def _serve(options: ServerOptions) -> int:
    console.status(f"loading {options.model}")
    with Server(options) as server:
        try:
            if not server.needs_key:
                _say_who_may_use_it(options.host)
            console.status(f"ready: {server.endpoint.url} (context {server.n_ctx}{_why(options, server.n_ctx)})")
            server.wait()
        except (KeyboardInterrupt, Terminated):
            _say_what_was_used(options, server)
            console.status("stopping")
        return server.stop()


def _say_who_may_use_it(host: str) -> None:
    if is_loopback(host):
        console.status("no key is set: pages in a browser can use this server too; HYMOE_API_KEY sets a key")
    else:
        console.warn(f"everybody who reaches {host} can use this server; HYMOE_API_KEY sets a key")


def _say_what_was_used(options: ServerOptions, server: Server) -> None:
    if options.router is not None and (mean := mean_experts(server.endpoint)) is not None:
        console.status(f"experts used per token and layer: {mean:.2f} ({options.router})")


def _why(options: ServerOptions, n_ctx: int) -> str:
    return "; --ctx N for more" if options.ctx is None and n_ctx == DEFAULT_CTX else ""
