"""What every answer beside `/v2` tells browsers and caches, unless a route has said it itself.

Sources: OWASP, "HTTP Security Response Headers"; CSP level 3; RFC 6797 (HSTS); RFC 9111, 5.2.2.5 (no-store).
"""

from __future__ import annotations

from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_ALWAYS: Final = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"content-security-policy", b"default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"),
    (b"cache-control", b"no-store"),
)
_HTTPS_ONLY: Final = (b"strict-transport-security", b"max-age=31536000")


class SecurityHeaders:
    """`app` with these headers. `https`: clients reach it by https whatever a request says of itself."""

    def __init__(self, app: ASGIApp, *, https: bool) -> None:
        self._app = app
        self._https = https

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        wanted = (*_ALWAYS, _HTTPS_ONLY) if self._https or scope["scheme"] == "https" else _ALWAYS

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", ()))
                said = {name.lower() for name, _ in headers}
                message = {**message, "headers": headers + [header for header in wanted if header[0] not in said]}
            await send(message)

        await self._app(scope, receive, send_with_headers)
