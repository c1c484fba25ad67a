"""Where a server answers, and the key it wants."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
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
            fix="set HYMOE_API_KEY to another",
        )


def is_loopback(host: str) -> bool:
    """Whether `host`, an address without brackets or a name, can only be this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
