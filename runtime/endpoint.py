"""Where a server answers, and the key it wants."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from hymoe.errors import ServerError


@dataclass(frozen=True)
class Endpoint:
    """Where a server answers: `url` has no path and no trailing slash."""

    url: str
    api_key: str | None = None


def endpoint_from_url(url: str, api_key: str | None) -> Endpoint:
    """Accept what people paste: without a scheme, with a slash or /v1 at the end.

    Raises ServerError for no URL and for a key that `check_api_key` refuses.
    """
    full = url if "://" in url else f"http://{url}"
    try:
        parts = urlsplit(full)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        usable = False
    if not usable:
        raise ServerError("--url", got=url, expected="something like http://127.0.0.1:8080")
    check_api_key(api_key)
    return Endpoint(full.rstrip("/").removesuffix("/v1").rstrip("/"), api_key)


def check_api_key(key: str | None) -> None:
    """Refuse a key that would not arrive as it is. Raises ServerError, which never shows the key.

    The engine reads its key as a row of comma-separated values, quotes included: `ab,cd` would be two keys, `,` none.
    A header of HTTP is ASCII, and a space would end the key.
    """
    if key and not all("!" <= character <= "~" and character not in ',"' for character in key):
        raise ServerError(
            "API key",
            got="one with other characters",
            expected="printable ASCII without spaces, commas and double quotes",
            fix="choose another",
        )


def keys_of(file: Path) -> list[str]:
    """Read a file of keys as the engine does: one a line, # begins a comment. Raises ServerError for none."""
    try:
        # not read_text: the engine takes a carriage return for part of the key
        lines = file.read_bytes().decode("utf-8", "replace").split("\n")
    except OSError as exc:
        raise ServerError(f"--api-key-file {file}: cannot be read", got=exc.strerror or exc) from exc
    keys = [line for line in lines if line and not line.startswith("#")]
    if any(key.endswith("\r") for key in keys):
        raise ServerError(
            f"--api-key-file {file}", got="line ends of Windows", expected="a newline alone", fix="dos2unix mends it"
        )
    if not keys:
        raise ServerError(f"--api-key-file {file}", got="no key in it", expected="one a line")
    return keys


def is_shared(file: Path) -> bool:
    """Whether others than its owner can do anything with a file; False where its mode says nothing about that."""
    return os.name == "posix" and bool(file.stat().st_mode & 0o077)


def check_access(host: str, keys: Collection[str], *, insecure: bool) -> None:
    """Refuse to serve other machines without a key that they must send. Raises ServerError."""
    for key in keys:
        check_api_key(key)
    if not (keys or insecure or is_loopback(host)):
        raise ServerError(
            f"--host {host}: everybody who reaches it could use this server",
            fix="set HYMOE_API_KEY or give --api-key-file FILE, or --insecure where that is meant",
        )


def is_loopback(host: str) -> bool:
    """Whether `host`, an address without brackets or a name, can only be this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
