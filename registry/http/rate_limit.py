"""The limit of requests, in one place for all that is asked for: `/v2`, and everything beside it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from math import ceil
from typing import Final

from registry.client_addresses import network_of
from registry.http.errors import error_json, status_of
from registry.http.exchange import Receive, Scope, Send
from storage.errors import TooManyRequests

HEALTH_PATH: Final = "/health/"
HEALTH_KEY: Final = "health "
"""The payer of a request for the registry's health begins with it."""

RateLimit = Callable[[str], float]
"""Takes a request of somebody. How many seconds they have to wait; 0.0: they need not, and else nothing was taken."""


def rate_key(name: str, named: bool, address: str) -> str:
    """Returns the key that a request counts against: the account, or without one the client's address."""
    return f"account {name}" if named else network_of(address)


def check_rate(pace: RateLimit | None, payer: str) -> None:
    """Counts a request. Raises TooManyRequests, with the time to wait in whole seconds, as Retry-After has it."""
    if pace is not None and (wait := pace(payer)):
        raise TooManyRequests(retry_after=max(1, ceil(wait)))


class RateLimitedApp:
    """What lies beside `/v2`. Its requests count with those of the client's address, since it is found out later who
    asks. Those for the registry's health count by themselves, so that the pulls of an address do not make the registry
    look ill to whoever watches it from there."""

    def __init__(
        self, app: Callable[[Scope, Receive, Send], Awaitable[None]], pace: Callable[[], RateLimit | None]
    ) -> None:
        """`pace` gives the limit, if there is one."""
        self._app = app
        self._pace = pace

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            client = scope.get("client")
            network = network_of(client[0]) if client else ""
            payer = HEALTH_KEY + network if scope["path"].startswith(HEALTH_PATH) else network
            try:
                check_rate(self._pace(), payer)
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
