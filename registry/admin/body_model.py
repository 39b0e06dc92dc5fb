"""`BodyModel`: the base class of the request bodies of the management API. It limits how many errors the validation of
a body can report. Without a limit, 600 KB of unknown fields become 68,000 error objects, which take 60 MB of memory and
block the event loop for most of a second. `registry.admin.body_limits` limits the size of a body and the number of its
JSON values."""

from __future__ import annotations

from typing import Annotated, Any, Final, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

MAX_UNKNOWN_FIELDS: Final = 20
"""If an object has over this many fields more than its model, `BodyModel` reports a single error, which names no field.
Otherwise `BodyModel` reports one error for each unknown field."""
ItemT = TypeVar("ItemT")
FailFastList = Annotated[list[ItemT], Field(fail_fast=True)]
"""Type of a list whose validation ends at the first invalid item, so that a long list cannot cause many errors."""


class BodyModel(BaseModel):
    """Base class of request bodies. An unknown field is an error. Error texts never show the input, because the input
    may contain a password. In a subclass, each list field must have the type `FailFastList` and each `dict` field the
    validator `max_entries`, so that no body can cause many errors."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _check_field_count(cls, fields: Any) -> Any:
        """Raises a single error if the object has too many fields (`MAX_UNKNOWN_FIELDS`)."""
        if isinstance(fields, dict) and len(fields) > len(cls.model_fields) + MAX_UNKNOWN_FIELDS:
            raise PydanticCustomError(
                "too_many_fields",
                "The object has {count} fields, most of which are unknown",
                {"count": len(fields)},
            )
        return fields


def max_entries(limit: int) -> BeforeValidator:
    """Returns a validator for a `dict` field. If the object has more than `limit` entries, the validator reports only
    one error. `Field(max_length=…)` would also report an error for each invalid entry."""

    def check_count(entries: Any) -> Any:
        if isinstance(entries, dict) and len(entries) > limit:
            raise PydanticCustomError(
                "too_many_entries",
                "The object has {count} entries; at most {limit} are allowed",
                {"count": len(entries), "limit": limit},
            )
        return entries

    return BeforeValidator(check_count)
