"""The routers of the management API. All routes have the same prefix, the same checks and the same error responses."""

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
    404: "The path or the body names something that does not exist, or that this account may not see",
    409: "The name is taken, no enabled admin would be left, or another job of the same kind is running",
    413: "The body is too long",
    415: "The body is not JSON",
    422: "The body or the query is not as described",
    429: "Too many attempts; Retry-After says how long to wait",
}


_SECURITY_SCHEMES: Final = {
    "Basic": {
        "type": "http",
        "description": "Account and password, or an API token in the password's place",
        "scheme": "basic",
    },
    "Bearer": {"type": "http", "description": "An API token", "scheme": "bearer"},
}
"""The ways to log in to the API (OpenAPI 3.1, "Security Scheme Object")."""


def _error_responses() -> dict[int | str, dict[str, Any]]:
    """Returns the descriptions of the error responses, which every route has. They refer to the schema of `Errors`,
    which `complete_document` adds to the OpenAPI document. With the model `Errors` itself, FastAPI would spend 1 ms on
    each route when the server starts."""
    schema = {"application/json": {"schema": {"$ref": "#/components/schemas/Errors"}}}
    return {status: {"content": schema, "description": text} for status, text in _ERROR_DESCRIPTIONS.items()}


def complete_document(document: dict[str, Any]) -> None:
    """Adds to the OpenAPI document what all operations below `API_PREFIX` share: the schema of their error responses,
    and the ways to log in. `identify_caller` authenticates the requests.

    FastAPI could add the ways to log in itself if each route declared them as dependencies. But FastAPI analyses the
    dependencies of every route when the server starts, so more dependencies would make the start slower."""
    components = document.setdefault("components", {})
    schema = Errors.model_json_schema(mode="serialization", ref_template="#/components/schemas/{model}")
    components.setdefault("schemas", {}).update(schema.pop("$defs"), Errors=schema)
    components["securitySchemes"] = _SECURITY_SCHEMES
    for path, operations in document["paths"].items():
        if path.startswith(f"{API_PREFIX}/"):
            for operation in operations.values():
                operation["security"] = [{name: []} for name in _SECURITY_SCHEMES]


def management_router(route_class: type[ManagementRoute] = ManagementRoute) -> APIRouter:
    """Returns a router for routes below `API_PREFIX`. The router adds the prefix to the path of each route."""
    return APIRouter(prefix=API_PREFIX, route_class=route_class, responses=_error_responses())
