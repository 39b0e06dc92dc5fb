"""Limits on the work and the memory that a JSON body of the management API can cause.

The limits apply one after the other: to the bytes of the body (`BoundedRequest`), to the number of values in it before
it is parsed, and to the number of errors that its model reports (`BodyModel`). Without the last two limits, 600 KB of
unknown fields would become 68,000 error objects, which take 60 MB and block the event loop for most of a second.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Final, TypeVar

from fastapi import Request
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError
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
MAX_UNKNOWN_FIELDS: Final = 20
"""If an object has at most this many more fields than its model, there is an error for each unknown field. If it has
more, there is a single error, which names no field."""
ItemT = TypeVar("ItemT")
FailFastList = Annotated[list[ItemT], Field(fail_fast=True)]
"""A list whose validation ends at the first invalid item, so that a long list cannot cause many errors."""


class BodyModel(BaseModel):
    """Base class of request bodies. An unknown field is an error. Error texts never show the input, because it may hold
    a password. Each list field has the type `FailFastList`, and each object field has `max_entries`, so that no body
    can cause many errors."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _check_field_count(cls, fields: Any) -> Any:
        """Raises one error if the object has so many fields that more than `MAX_UNKNOWN_FIELDS` must be unknown. Only
        counts the fields and does not look at their names."""
        if isinstance(fields, dict) and len(fields) > len(cls.model_fields) + MAX_UNKNOWN_FIELDS:
            raise PydanticCustomError(
                "too_many_fields",
                "The object has {count} fields, most of which are unknown",
                {"count": len(fields)},
            )
        return fields


def max_entries(limit: int) -> BeforeValidator:
    """Returns a validator for a field that is an object whose keys are not fixed. It reports one error if the object
    has more than `limit` entries. `Field(max_length=…)` would report an error for each invalid entry as well."""

    def check_count(entries: Any) -> Any:
        if isinstance(entries, dict) and len(entries) > limit:
            raise PydanticCustomError(
                "too_many_entries",
                "The object has {count} entries; at most {limit} are allowed",
                {"count": len(entries), "limit": limit},
            )
        return entries

    return BeforeValidator(check_count)


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
