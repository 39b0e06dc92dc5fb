"""The files that the pages load: the style sheet, the scripts and the icon. Browsers cache these files for ever.

The path of each file contains a hash of all files (`/ui/static/HASH/page.css`). When a file changes, all paths change,
so browsers load the new files. All files are in the same folder, so scripts can import each other by relative paths.
`htmx.min.js` comes from the installed package `django-js-lib-htmx`, whose Python code is not used. The other files come
from the folder `static`.
"""

from __future__ import annotations

import asyncio
import hashlib
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from fastapi import APIRouter, HTTPException, Request, Response

STATIC_PATH: Final = "/ui/static"
HTMX: Final = "htmx.min.js"
_FOLDER: Final = Path(__file__).parent / "static"
_MEDIA_TYPES: Final = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_FOR_EVER: Final = "public, max-age=31536000, immutable"
"""The `cache-control` header of files whose path has the current hash. `immutable` is defined in RFC 8246."""


class PageFiles:
    """The files that the pages load. Each process reads them once, when it first needs them."""

    @cached_property
    def _files(self) -> dict[str, bytes]:
        files = {path.name: path.read_bytes() for path in _FOLDER.iterdir() if path.suffix in _MEDIA_TYPES}
        spec = find_spec("js_lib_htmx")
        assert spec is not None
        assert spec.origin is not None
        files[HTMX] = (Path(spec.origin).parent / "static" / "htmx" / HTMX).read_bytes()
        return files

    @cached_property
    def version(self) -> str:
        """A hash of all files: 16 hex digits."""
        hash_of_files = hashlib.sha256()
        for name, content in sorted(self._files.items()):
            hash_of_files.update(f"{name} {len(content)}\n".encode())
            hash_of_files.update(content)
        return hash_of_files.hexdigest()[:16]

    def path(self, name: str) -> str:
        """Returns the path in the URL of a file. Raises KeyError if there is no such file. Blocks at the first call."""
        if name not in self._files:
            raise KeyError(name)
        return f"{STATIC_PATH}/{self.version}/{name}"

    def content(self, name: str) -> bytes | None:
        """Returns the content of a file; None if there is no such file. Blocks at the first call."""
        return self._files.get(name)


router = APIRouter(include_in_schema=False)


@router.get(STATIC_PATH + "/{version}/{name}")
async def page_file(request: Request, version: str, name: str) -> Response:
    """Returns a file that the pages load. `version`: the hash in the path. During an upgrade, the old and the new
    program serve at the same time, so the hash may be the other program's. The response then has this program's file
    and the header `cache-control: no-cache`, so that the browser does not keep the file under that path. Raises
    HTTPException (404)."""
    files: PageFiles = request.app.pages.files
    content = await asyncio.to_thread(files.content, name)
    if content is None:
        raise HTTPException(404, "there is nothing at this path")
    headers = {
        "cache-control": _FOR_EVER if version == files.version else "no-cache",
        "cross-origin-resource-policy": "same-origin",
        "x-content-type-options": "nosniff",
    }
    return Response(content, headers=headers, media_type=_MEDIA_TYPES[Path(name).suffix])
