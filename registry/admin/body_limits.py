"""Limits the bytes of a JSON body of the management API (`BoundedRequest`), and the number of JSON values in the body
before it is parsed. A third limit applies to the errors that the validation of the body reports
(`registry.admin.body_model`)."""

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
"""Maximum size in bytes of a body with a long text or with a list of many tags. Such a request changes a repository,
and its body is received only after the caller's rights on that repository were checked."""
_VALUE_BOUNDS: Final = Bounds(values=20_000)
"""Largest number of JSON values in a body: twice the 10,000 names of the largest list that a route takes. Without this
limit, 640 KiB of `[],[],…` would block the event loop for 50 ms."""


class BoundedRequest(Request):
    """A request whose body has at most `max_body_bytes`. Reading a larger body raises HTTPException (413), also if the
    body has no Content-Length."""

    def __init__(self, request: Request, max_body_bytes: int) -> None:
        super().__init__(request.scope, _limit_body(request.receive, max_body_bytes))
        self._document: Any = None

    async def json(self) -> Any:
        """Returns the parsed body. Raises HTTPException (413) if it has too many values or too long a number, and
        ValueError or RecursionError if it is not JSON in UTF-8."""
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


def too_long(max_body_bytes: int) -> HTTPException:
    """Returns the error for a body of more than `max_body_bytes`."""
    return HTTPException(413, f"the body is too long: it may have at most {max_body_bytes} bytes")


def _limit_body(receive: Receive, max_body_bytes: int) -> Receive:
    """Returns an ASGI `receive` that raises HTTPException (413) once the body exceeds `max_body_bytes`."""
    remaining_bytes = max_body_bytes

    async def limited_receive() -> Message:
        nonlocal remaining_bytes
        message = await receive()
        remaining_bytes -= len(message.get("body", b""))
        if remaining_bytes < 0:
            raise too_long(max_body_bytes)
        return message

    return limited_receive
