"""The root page and the documentation of the API.

`/` shows a short text for people. `/api/openapi.json` is the OpenAPI document of the management API, `/api/docs` shows
it as a page that loads nothing from the internet. Swagger UI comes with the package `fastapi-swagger`, of which only
the files are used.
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

welcome_router = APIRouter()


@welcome_router.get("/", response_class=PlainTextResponse, include_in_schema=False)
async def welcome(request: Request) -> str:
    """Names the registry and shows a first push."""
    host = request.headers.get("host", "localhost:5000")
    return (
        "Entrepot, a Docker/OCI registry.\n\n"
        f"  docker tag app {host}/team/app\n"
        f"  docker push {host}/team/app\n\n"
        "API: /v2/ (OCI distribution spec), /api/v1 (accounts and rights, described at /api/docs).\n"
        "Health: /health/live, /health/ready\n"
    )


OPENAPI_PATH: Final = "/api/openapi.json"
_ASSETS: Final = {
    "swagger-ui-bundle.js": "text/javascript; charset=utf-8",
    "swagger-ui.css": "text/css; charset=utf-8",
    "favicon-32x32.png": "image/png",
}
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
<noscript>The same as JSON: <a href="/api/openapi.json">/api/openapi.json</a></noscript>
<script src="/api/docs/swagger-ui-bundle.js"></script>
<script src="/api/docs/start.js"></script>
</body>
</html>
"""
_START_SCRIPT: Final = f"""SwaggerUIBundle({{
  url: "{OPENAPI_PATH}",
  dom_id: "#docs",
  deepLinking: true,
  filter: true,
  validatorUrl: null,
}});
"""
_HEADERS: Final = {
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
async def page() -> HTMLResponse:
    return HTMLResponse(_PAGE, headers=_HEADERS)


@docs_router.get("/start.js")
async def start() -> Response:
    return Response(_START_SCRIPT, headers=_HEADERS, media_type="text/javascript")


@docs_router.get("/{name}")
async def asset(name: str) -> Response:
    if name not in _ASSETS:
        raise HTTPException(404, "there is nothing at this path")
    file = await asyncio.to_thread(_asset_file, name)
    return FileResponse(file, headers=_HEADERS, media_type=_ASSETS[name])


def _asset_file(name: str) -> Path:
    """Returns the file's path. Does not import the package."""
    spec = find_spec("fastapi_swagger")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "resources" / name


class OpenAPIDocument:
    """The OpenAPI document as JSON, made in a thread at the first request: this takes 150 ms."""

    def __init__(self, make: Callable[[], dict[str, Any]]) -> None:
        """`make` returns the document, such as `FastAPI.openapi`."""
        self._make = make
        self._lock = asyncio.Lock()
        self._text: bytes | None = None

    async def text(self) -> bytes:
        """Returns the document."""
        async with self._lock:
            if self._text is None:
                self._text = await asyncio.to_thread(lambda: json.dumps(self._make()).encode("ascii"))
            return self._text


def openapi_router(description: OpenAPIDocument) -> APIRouter:
    """Returns the route of the document."""
    router = APIRouter(include_in_schema=False)

    @router.get(OPENAPI_PATH)
    async def openapi() -> Response:
        return Response(await description.text(), media_type="application/json")

    return router
