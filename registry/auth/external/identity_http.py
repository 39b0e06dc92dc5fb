"""HTTP requests to OpenID providers and token issuers. Size and time are bounded, and no redirect is followed."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import httpx2

MAX_RESPONSE_BYTES: Final = 256 * 1024
"""The largest response body that is read."""
TOTAL_SECONDS: Final = 10.0
"""The timeout for a whole request and its response."""


class NoUsableResponse(Exception):
    """The server sent no usable response. The text says why, for the log."""


async def send_request(
    url: str,
    ca_file: Path | None = None,
    *,
    form: Mapping[str, str] | None = None,
    headers: Mapping[str, str] | None = None,
) -> tuple[int, bytes]:
    """Sends a request and returns the status and the body of the response.

    Sends a POST with `form` if one is given, and a GET otherwise. `ca_file` has certificates to trust instead of the
    system's. Raises NoUsableResponse. If the caller is cancelled, closes the connection.
    """
    try:
        async with asyncio.timeout(TOTAL_SECONDS):
            context = await asyncio.to_thread(_context, ca_file)
            # The settings allow http only for services on this machine, which a proxy cannot reach.
            use_proxy = urlsplit(url).scheme == "https"
            fields = {"Accept": "application/json", **(headers or {})}
            method = "GET" if form is None else "POST"
            async with (
                httpx2.AsyncClient(verify=context, trust_env=use_proxy, timeout=TOTAL_SECONDS / 2) as client,
                client.stream(method, url, headers=fields, data=form) as response,
            ):
                body = bytearray()
                async for piece in response.aiter_bytes():
                    body += piece
                    if len(body) > MAX_RESPONSE_BYTES:
                        raise NoUsableResponse(f"the answer has more than {MAX_RESPONSE_BYTES} bytes")
                return response.status_code, bytes(body)
    except TimeoutError:
        raise NoUsableResponse(f"no whole answer in {TOTAL_SECONDS:.0f} s") from None
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError) as error:
        raise NoUsableResponse(str(error)[:200] or type(error).__name__) from None


def _context(ca_file: Path | None) -> ssl.SSLContext:
    """Returns the TLS settings. Blocks for about 30 ms to read certificates. Raises OSError."""
    return httpx2.create_ssl_context() if ca_file is None else ssl.create_default_context(cafile=str(ca_file))
