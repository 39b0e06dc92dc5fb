"""Requests to identity providers and issuers: bounded in size and time, without redirects."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import httpx2

MAX_RESPONSE_BYTES: Final = 256 * 1024
"""Bytes of a response body."""
TOTAL_SECONDS: Final = 10.0
"""Seconds until the whole response has to be here."""


class NoUsableResponse(Exception):
    """There is no usable response. The text is for the log."""


async def send_request(
    url: str,
    ca_file: Path | None = None,
    *,
    form: Mapping[str, str] | None = None,
    headers: Mapping[str, str] | None = None,
) -> tuple[int, bytes]:
    """Returns the status and the body of the response. Follows no redirect.

    Sends a POST if there is a `form`, a GET otherwise. `ca_file` replaces the system's certificates. Raises
    NoUsableResponse. Cancelled: closes the connection.
    """
    try:
        async with asyncio.timeout(TOTAL_SECONDS):
            context = await asyncio.to_thread(_context, ca_file)
            # Plain http is for services on this machine only, which no proxy can reach.
            remote = urlsplit(url).scheme == "https"
            fields = {"Accept": "application/json", **(headers or {})}
            method = "GET" if form is None else "POST"
            async with (
                httpx2.AsyncClient(verify=context, trust_env=remote, timeout=TOTAL_SECONDS / 2) as client,
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
    """Returns the TLS settings. Blocks for about 30 ms. Raises OSError."""
    return httpx2.create_ssl_context() if ca_file is None else ssl.create_default_context(cafile=str(ca_file))
