"""The routers of the management API: all routes have the same prefix, the same checks and the same error responses."""

from __future__ import annotations

from typing import Any, Final

from fastapi import APIRouter
from pydantic import BaseModel

from registry.admin.management_route import ManagementRoute

API_PREFIX: Final = "/api/v1"


class Error(BaseModel):
    """One error. `code` is an error code of the OCI distribution spec, for programs; `message` is for people; `detail`
    depends on the code."""

    code: str
    message: str
    detail: Any | None = None


class Errors(BaseModel):
    """The body of an error response, in the format of the OCI distribution spec."""

    errors: list[Error]


_ERROR_DESCRIPTIONS: Final[dict[int, str]] = {
    400: "A name, a pattern or another value is not valid",
    401: "Log in first, or with other credentials",
    403: "This account may not do this",
    404: "What the path or the body names does not exist, or this account may not see it",
    409: "The name is taken, no enabled admin would be left, or another job of the same kind is running",
    413: "The body is too long",
    415: "The body is not JSON",
    422: "The body or the query is not as described",
    429: "Too many attempts; Retry-After says how long to wait",
}


def _error_responses() -> dict[int | str, dict[str, Any]]:
    """Returns the descriptions of the error responses, which every route has. Only the first has the model `Errors`, so
    that FastAPI adds the schema of this model to the OpenAPI document. The others refer to that schema, because FastAPI
    needs 0.3 ms to prepare a model for each response of each route."""
    (first_status, first_text), *others = _ERROR_DESCRIPTIONS.items()
    schema = {"application/json": {"schema": {"$ref": "#/components/schemas/Errors"}}}
    return {
        first_status: {"model": Errors, "description": first_text},
        **{status: {"content": schema, "description": text} for status, text in others},
    }


def management_router(route_class: type[ManagementRoute] = ManagementRoute) -> APIRouter:
    """Returns a router for routes below `API_PREFIX`. A route names its path without the prefix; the router adds it."""
    return APIRouter(prefix=API_PREFIX, route_class=route_class, responses=_error_responses())
