"""HTTP requests to OpenID providers and token issuers. The size of a response and the time until it is complete are
limited. Redirects are not followed."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import httpx2

from registry.response_limits import PIECES_PER_PAUSE, NoCookies

MAX_RESPONSE_BYTES: Final = 256 * 1024
"""The largest response body that is accepted."""
TOTAL_SECONDS: Final = 10.0
"""The timeout for the whole of a request and its response."""
STEP_SECONDS: Final = TOTAL_SECONDS / 2
"""The timeout for each step of a request: connecting, sending, and each wait for more bytes of the response."""


class NoUsableResponse(Exception):
    """The request failed, or its response cannot be used. The message states the reason, for the log."""


async def send_request(
    url: str,
    ca_file: Path | None = None,
    *,
    form: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> tuple[int, bytes]:
    """Sends a request to `url` and returns the status and the body of the response, whatever the status is.

    - `ca_file`: PEM file with the CA certificates to trust. None: trusts the CA certificates of the system.
    - `form`: a URL-encoded form to send with POST. None: sends a GET.
    - `headers`: headers to send in addition to `Accept`, which asks for JSON.

    Raises NoUsableResponse. If the caller is cancelled, closes the connection.
    """
    try:
        async with asyncio.timeout(TOTAL_SECONDS):
            context = await asyncio.to_thread(_tls_context, ca_file)
            # With `trust_env`, the client uses the proxy that environment variables name. The settings allow http only
            # for services on this machine, which a proxy cannot reach.
            use_proxy = urlsplit(url).scheme == "https"
            request_headers = {"Accept": "application/json", **(headers or {})}
            if form is not None:
                request_headers["Content-Type"] = "application/x-www-form-urlencoded"
            method = "GET" if form is None else "POST"
            async with (
                httpx2.AsyncClient(
                    verify=context, trust_env=use_proxy, timeout=STEP_SECONDS, cookies=NoCookies()
                ) as client,
                client.stream(method, url, headers=request_headers, content=form) as response,
            ):
                body = bytearray()
                pieces = 0
                async for piece in response.aiter_bytes():
                    body += piece
                    pieces += 1
                    if pieces % PIECES_PER_PAUSE == 0:
                        await asyncio.sleep(0)  # lets other tasks run
                    if len(body) > MAX_RESPONSE_BYTES:
                        raise NoUsableResponse(f"the response has more than {MAX_RESPONSE_BYTES} bytes")
                return response.status_code, bytes(body)
    except TimeoutError:
        raise NoUsableResponse(f"no complete response within {TOTAL_SECONDS:.0f} s") from None
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError) as error:
        raise NoUsableResponse(str(error)[:200] or type(error).__name__) from None
    except AttributeError as error:
        if not _means_connection_reset(error):
            raise
        raise NoUsableResponse("the server has reset the connection") from None


def _means_connection_reset(error: AttributeError) -> bool:
    """Returns whether the error means that the server has reset a new connection. uvloop then returns None in place of
    the closed socket, and anyio calls `getpeername` on None."""
    return error.obj is None and error.name == "getpeername"


def _tls_context(ca_file: Path | None) -> ssl.SSLContext:
    """Returns a TLS context that trusts the certificates in `ca_file`, or the certificates of the system if `ca_file`
    is None. Blocks for about 30 ms to read the certificates. Raises OSError if the certificates cannot be read."""
    return httpx2.create_ssl_context() if ca_file is None else ssl.create_default_context(cafile=str(ca_file))
