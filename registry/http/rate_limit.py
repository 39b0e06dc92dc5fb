"""The rate limit of requests, for `/v2` and for everything beside it."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import Final

from registry.client_addresses import network_of
from registry.http.asgi import ASGIApp, Receive, Scope, Send, client_address
from registry.http.errors import error_json, status_of
from storage.errors import TooManyRequests

HEALTH_PATH: Final = "/health/"
HEALTH_KEY: Final = "health "
"""The prefix of the keys that health checks count against."""

RateLimit = Callable[[str], float]
"""Counts a request against a key. Returns 0.0 if it is within the limit; else the seconds to wait, without counting
it."""


def rate_key(name: str, is_account: bool, address: str) -> str:
    """Returns the key that a request counts against: the account, or without one the client's network."""
    return f"account {name}" if is_account else network_of(address)


def check_rate(rate_limit: RateLimit | None, key: str) -> None:
    """Counts a request. Raises TooManyRequests, with the seconds to wait rounded up, for Retry-After."""
    if rate_limit is not None and (wait := rate_limit(key)):
        raise TooManyRequests(retry_after=max(1, ceil(wait)))


class RateLimitedApp:
    """The application beside `/v2`, with the rate limit. Its requests count against the client's network, since the
    account is found out later. Health checks count by themselves: many pulls from a network must not make the registry
    look unhealthy to a monitor in that network."""

    def __init__(self, app: ASGIApp, rate_limit: RateLimit | None) -> None:
        self._app = app
        self._rate_limit = rate_limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            network = network_of(client_address(scope))
            key = HEALTH_KEY + network if scope["path"].startswith(HEALTH_PATH) else network
            try:
                check_rate(self._rate_limit, key)
            except TooManyRequests as error:
                await _refuse(send, error)
                return
        await self._app(scope, receive, send)


async def _refuse(send: Send, error: TooManyRequests) -> None:
    body = error_json(error.code, error.message)
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"retry-after", b"%d" % error.retry_after),
    ]
    await send({"type": "http.response.start", "status": status_of(error), "headers": headers})
    await send({"type": "http.response.body", "body": body})
