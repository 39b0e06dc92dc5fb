"""Applies the rate limit to requests. For requests to `/v2`, the API calls `rate_key` and `check_rate`. For requests to
all other paths, `RateLimitedApp` wraps the application."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from math import ceil
from typing import Final

from registry.asgi import AsgiApp, Receive, Scope, Send, client_address
from registry.client_addresses import network_of
from registry.http.error_statuses import error_json, status_of
from storage.errors import TooManyRequests

HEALTH_PATH_PREFIX: Final = "/health/"
"""Every path with this prefix is the path of a health check."""
HEALTH_PATHS: Final = frozenset({"/livez", "/readyz"})
"""The paths of health checks that do not begin with `HEALTH_PATH_PREFIX`."""
HEALTH_KEY_PREFIX: Final = "health "
"""Prefix of the keys under which health checks are counted. It gives health checks a limit of their own."""

RateLimit = Callable[[str], float]
"""A function that gets the key of a request, such as a client network. If the limit of the key allows the request, the
function counts the request and returns 0.0. Otherwise it counts nothing, and returns the seconds after which the client
may send the request again."""

Refuse = Callable[[Scope, Send, TooManyRequests], Awaitable[None]]
"""A function that sends the response to a request that the rate limit refuses. The first argument is the ASGI scope of
the request."""


def rate_key(name: str, has_account: bool, address: str) -> str:
    """Returns the key under which a request is counted. If the client has an account, the key contains the
    account's `name`. Otherwise the key is the network of the client's IP address."""
    return f"account {name}" if has_account else network_of(address)


def check_rate(rate_limit: RateLimit | None, key: str) -> None:
    """Counts a request under `key`. If the limit is reached, raises TooManyRequests with the seconds to wait, rounded
    up, for Retry-After. If `rate_limit` is None, there is no limit."""
    if rate_limit is not None and (wait := rate_limit(key)):
        raise TooManyRequests(retry_after=max(1, ceil(wait)))


class RateLimitedApp:
    """Applies the rate limit to `app`, the application for all paths outside `/v2`.

    A request is counted under the client's network, because the client's account is not known yet. Health checks are
    counted separately, so that other requests from the network of a monitor do not block its health checks."""

    def __init__(self, app: AsgiApp, rate_limit: RateLimit | None, refuse: Refuse | None = None) -> None:
        """`rate_limit`: counts the requests; None: there is no limit. `refuse`: sends the response to a request beyond
        the limit; None: `refuse_with_json`."""
        self._app = app
        self._rate_limit = rate_limit
        self._refuse = refuse or refuse_with_json

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            network = network_of(client_address(scope))
            is_health = scope["path"].startswith(HEALTH_PATH_PREFIX) or scope["path"] in HEALTH_PATHS
            key = HEALTH_KEY_PREFIX + network if is_health else network
            try:
                check_rate(self._rate_limit, key)
            except TooManyRequests as error:
                await self._refuse(scope, send, error)
                return
        await self._app(scope, receive, send)


async def refuse_with_json(scope: Scope, send: Send, error: TooManyRequests) -> None:
    """Refuses a request beyond the limit. Sends the status 429, the header Retry-After, and an error in the JSON format
    of the OCI spec."""
    body = error_json(error.code, error.message)
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"retry-after", b"%d" % error.retry_after),
    ]
    await send({"type": "http.response.start", "status": status_of(error), "headers": headers})
    await send({"type": "http.response.body", "body": body})
