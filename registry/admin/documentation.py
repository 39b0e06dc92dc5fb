"""`/api/docs`: the API's description as a page to read and to try, with no need for the internet.

Swagger UI itself comes with the package `fastapi-swagger`; of that only the files are used.
"""

from __future__ import annotations

import asyncio
from importlib.resources import files
from typing import Final

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response

OPENAPI: Final = "/api/openapi.json"
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
_START: Final = f"""SwaggerUIBundle({{
  url: "{OPENAPI}",
  dom_id: "#docs",
  deepLinking: true,
  filter: true,
  validatorUrl: null,
}});
"""
_HEADERS: Final = {
    # Swagger UI sets styles on its elements and draws icons from data: addresses; scripts come from here alone.
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "max-age=3600",
}

router = APIRouter(include_in_schema=False)


@router.get(OPENAPI)
async def description(request: Request) -> JSONResponse:
    """Made by the first request, in a thread: it takes a tenth of a second."""
    return JSONResponse(await asyncio.to_thread(request.app.openapi))


@router.get("/api/docs")
async def page() -> HTMLResponse:
    return HTMLResponse(_PAGE, headers=_HEADERS)


@router.get("/api/docs/start.js")
async def start() -> Response:
    return Response(_START, headers=_HEADERS, media_type="text/javascript")


@router.get("/api/docs/{name}")
async def asset(name: str) -> Response:
    if name not in _ASSETS:
        raise HTTPException(404, "there is nothing at this path")
    found = files("fastapi_swagger") / "resources" / name
    return Response(found.read_bytes(), headers={**_HEADERS, "content-type": _ASSETS[name]})
