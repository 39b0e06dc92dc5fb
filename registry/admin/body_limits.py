"""Limits the size and the number of values of a JSON body of the management API (`BoundedRequest`)."""

from __future__ import annotations

import json
from typing import Any, Final

from fastapi import Request
from starlette.exceptions import HTTPException

from registry.asgi import Message, Receive
from storage.json_bounds import Bounds, OutOfBounds, check_bounds, parse_bounded_float, parse_bounded_int

MAX_BODY_BYTES: Final = 64 * 1024
"""Maximum size of a request body in bytes."""
MAX_LARGE_BODY_BYTES: Final = 640 * 1024
"""Maximum size of a request body in bytes on routes that change a repository, which can take a long text or many tags.
These routes check the caller's rights on the repository before they receive the body."""
_VALUE_BOUNDS: Final = Bounds(max_values=20_000)
"""Limits the number of JSON values in a body: parsing 640 KiB of `[],[],…` would block the event loop for 50 ms. The
longest list that a route takes has 10,000 names."""


class BoundedRequest(Request):
    """A request whose body has at most `max_body_bytes`. Reading a larger body raises HTTPException (413), even if the
    request has no Content-Length."""

    def __init__(self, request: Request, max_body_bytes: int) -> None:
        super().__init__(request.scope, _limit_body(request.receive, max_body_bytes))
        self._document: Any = None

    async def json(self) -> Any:
        """Returns the parsed body. Raises HTTPException (413) if the body is too large, has too many values, or has a
        number with too many digits. Raises ValueError if the body is not JSON in UTF-8; RecursionError if its arrays or
        objects are nested too deeply."""
        if self._document is None:
            body = await self.body()
            try:
                check_bounds(body, _VALUE_BOUNDS)
                self._document = json.loads(
                    body.decode("utf-8-sig"), parse_int=parse_bounded_int, parse_float=parse_bounded_float
                )
            except OutOfBounds as error:
                raise HTTPException(413, f"the body is too large: {error}") from None
        return self._document


def too_long_error(max_body_bytes: int) -> HTTPException:
    """Returns the error for a body of more than `max_body_bytes`."""
    return HTTPException(413, f"the body is too long: it may have at most {max_body_bytes} bytes")


def _limit_body(receive: Receive, max_body_bytes: int) -> Receive:
    """Returns an ASGI `receive` function that raises HTTPException (413) when it has received more than
    `max_body_bytes`."""
    remaining_bytes = max_body_bytes

    async def limited_receive() -> Message:
        nonlocal remaining_bytes
        message = await receive()
        remaining_bytes -= len(message.get("body", b""))
        if remaining_bytes < 0:
            raise too_long_error(max_body_bytes)
        return message

    return limited_receive
