"""One question to a service outside that says who somebody is, and its answer: small, soon, and from there alone."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import httpx2

LARGEST_ANSWER: Final = 256 * 1024
"""Bytes of an answer."""
TOTAL_SECONDS: Final = 10.0
"""Seconds until the answer has to be here."""


class NoAnswer(Exception):
    """There is none, or none of use; the text is for the log."""


async def send_request(
    url: str,
    ca_file: Path | None = None,
    *,
    form: Mapping[str, str] | None = None,
    headers: Mapping[str, str] | None = None,
) -> tuple[int, bytes]:
    """The status and the body of the answer; no redirect is followed. `form`: POST it, else GET. `ca_file`: trusted
    instead of the system's certificates. Raises NoAnswer. Cancelled: the connection is closed."""
    try:
        async with asyncio.timeout(TOTAL_SECONDS):
            context = await asyncio.to_thread(_context, ca_file)
            # On this machine, where plain http is allowed, nothing goes through a proxy.
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
                    if len(body) > LARGEST_ANSWER:
                        raise NoAnswer(f"the answer has more than {LARGEST_ANSWER} bytes")
                return response.status_code, bytes(body)
    except TimeoutError:
        raise NoAnswer(f"no whole answer in {TOTAL_SECONDS:.0f} s") from None
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError) as error:
        raise NoAnswer(str(error)[:200] or type(error).__name__) from None


def _context(ca_file: Path | None) -> ssl.SSLContext:
    """Blocking, some 30 ms. Raises OSError."""
    return httpx2.create_ssl_context() if ca_file is None else ssl.create_default_context(cafile=str(ca_file))
