"""The OpenAPI document of the management API. It is generated once for each process of the tests, because that takes a
second."""

from __future__ import annotations

from functools import cache
from typing import Any

from registry.app import create_app
from registry.config import Settings


@cache
def api_document() -> dict[str, Any]:
    """Returns the OpenAPI document. The caller must not change it."""
    return create_app(Settings()).openapi()
