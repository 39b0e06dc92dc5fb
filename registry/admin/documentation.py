"""The welcome page `/` and the documentation of the API.

- `/` returns a short plain text for people.
- `/api/openapi.json` returns the OpenAPI document. It describes all routes outside `/v2`, except the routes with
  `include_in_schema=False`.
- `/api/docs` shows the OpenAPI document with Swagger UI. The page loads nothing from the internet. The files of Swagger
  UI come from the package `fastapi-swagger`, whose Python code is not used.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import FileResponse, HTMLResponse, PlainTextResponse, Response

from registry.single_flight import finish_in_thread

welcome_router = APIRouter()


@welcome_router.get("/", response_class=PlainTextResponse, include_in_schema=False)
async def welcome(request: Request) -> str:
    """Returns a plain text that names the software and shows how to push an image."""
    host = request.headers.get("host", "localhost:5000")
    return (
        "Entrepot, a Docker/OCI registry.\n\n"
        f"  docker tag app {host}/team/app\n"
        f"  docker push {host}/team/app\n\n"
        "API: /v2/ (OCI distribution spec), /api/v1 (accounts and rights, described at /api/docs).\n"
        "Health: /livez, /readyz\n"
    )


OPENAPI_PATH: Final = "/api/openapi.json"
_ASSET_TYPES: Final = {
    "swagger-ui-bundle.js": "text/javascript; charset=utf-8",
    "swagger-ui.css": "text/css; charset=utf-8",
    "favicon-32x32.png": "image/png",
}
"""The files of Swagger UI that `/api/docs/NAME` serves, with their media types."""
_PAGE: Final = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Entrepot API</title>
<link rel="stylesheet" href="/api/docs/swagger-ui.css">
<link rel="icon" type="image/png" href="/api/docs/favicon-32x32.png">
</head>
<body>
<div id="docs"></div>
<noscript>This page needs JavaScript. The API description as JSON:
<a href="/api/openapi.json">/api/openapi.json</a></noscript>
<script src="/api/docs/swagger-ui-bundle.js"></script>
<script src="/api/docs/start.js"></script>
</body>
</html>
"""
# `validatorUrl: null` keeps Swagger UI from sending the document to a validator on the internet.
_START_SCRIPT: Final = f"""SwaggerUIBundle({{
  url: "{OPENAPI_PATH}",
  dom_id: "#docs",
  deepLinking: true,
  filter: true,
  validatorUrl: null,
}});
"""
_HEADERS: Final = {  # of every successful response under /api/docs
    # Swagger UI sets inline styles and draws icons from data: URLs. Scripts come from this registry only.
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "max-age=3600",
}

docs_router = APIRouter(prefix="/api/docs", include_in_schema=False)


@docs_router.get("")
async def docs_page() -> HTMLResponse:
    """Returns the HTML page that loads Swagger UI."""
    return HTMLResponse(_PAGE, headers=_HEADERS)


@docs_router.get("/start.js")
async def start_script() -> Response:
    """Returns the script that starts Swagger UI. The page cannot contain the script, because the content security
    policy forbids inline scripts."""
    return Response(_START_SCRIPT, headers=_HEADERS, media_type="text/javascript")


@docs_router.get("/{name}")
async def docs_asset(name: str) -> Response:
    """Returns a file of Swagger UI. Raises HTTPException (404) if `name` is not in `_ASSET_TYPES`."""
    if name not in _ASSET_TYPES:
        raise HTTPException(404, "there is nothing at this path")
    path = await asyncio.to_thread(_asset_path, name)
    return FileResponse(path, headers=_HEADERS, media_type=_ASSET_TYPES[name])


def _asset_path(name: str) -> Path:
    """Returns the path of a file of Swagger UI in the package `fastapi-swagger`. Does not import the package."""
    spec = find_spec("fastapi_swagger")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "resources" / name


class OpenAPIDocument:
    """The OpenAPI document as JSON. The first request builds the document in a thread, because this takes 150 ms."""

    def __init__(self, build: Callable[[], dict[str, Any]]) -> None:
        """`build`, such as `FastAPI.openapi`, returns the document as a dict."""
        self._build = build
        self._lock = asyncio.Lock()
        self._json: bytes | None = None

    async def json_bytes(self) -> bytes:
        """Returns the document as JSON in ASCII."""
        async with self._lock:
            if self._json is None:
                self._json = await finish_in_thread(lambda: json.dumps(self._build()).encode("ascii"))
            return self._json


openapi_router = APIRouter(include_in_schema=False)
"""The route of the OpenAPI document. FastAPI caches route functions for ever. If the route function had a reference to
the application, the cache would keep the application in memory. So it gets the application from the request."""


@openapi_router.get(OPENAPI_PATH)
async def openapi(request: Request) -> Response:
    document: OpenAPIDocument = request.app.openapi_document
    return Response(await document.json_bytes(), media_type="application/json")
