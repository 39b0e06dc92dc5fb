"""The response with an image as a tar archive (`ArchiveResponse`): whole, or the range that the client asks for (RFC
9110, 14)."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import aclosing, contextmanager
from typing import Final

from starlette.responses import Response

from registry.asgi import Receive, Scope, Send
from registry.browse.image_archive import ImageArchive
from registry.browse.repository_browser import acting
from registry.request import RequestContext
from storage.errors import RangeInvalid, RegistryError, TooManyRequests

log = logging.getLogger("registry.management")

_RANGE: Final = re.compile(r"bytes=(?:([0-9]{1,18})-([0-9]{0,18})|-([0-9]{1,18}))")
"""A request for one range. A client that asks for several gets the whole archive."""


class RunningDownloads:
    """Counts the archives that this process sends. `limit`: how many it sends at the same time."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._running = 0

    @contextmanager
    def slot(self) -> Iterator[None]:
        """A context manager that counts a download. Raises TooManyRequests if too many run."""
        if self._running >= self._limit:
            raise TooManyRequests("too many images are being downloaded; try again in a moment", retry_after=30)
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1


class ArchiveResponse(Response):
    """Sends an archive while it is made, as fast as the client takes it. Holds only one piece of a blob in memory."""

    def __init__(
        self,
        archive: ImageArchive,
        request: RequestContext,
        headers: Mapping[str, str],
        downloads: RunningDownloads,
    ) -> None:
        """`request`: its principal's rights are checked when each blob is opened. `headers`: those of the HTTP request.
        Raises RangeInvalid if no byte of the archive lies in the range that the client asks for."""
        span = _requested_span(archive, headers)
        start, stop = span or (0, archive.size)
        own_headers = {
            "Accept-Ranges": "bytes",
            "Content-Disposition": f'attachment; filename="{archive.file_name}"',
            "Content-Length": str(stop - start),
            "ETag": archive.etag,
        }
        if span is not None:
            own_headers["Content-Range"] = f"bytes {start}-{stop - 1}/{archive.size}"
        super().__init__(status_code=200 if span is None else 206, headers=own_headers, media_type="application/x-tar")
        self._archive = archive
        self._request = request
        self._span = start, stop
        self._downloads = downloads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the response. If reading a blob fails, the response ends early and the server closes the connection;
        the client can ask for the rest later. Raises TooManyRequests if too many archives are being sent."""
        with self._downloads.slot(), acting(self._request):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async with aclosing(self._archive.read(*self._span)) as pieces:
                try:
                    async for piece in pieces:
                        await send({"type": "http.response.body", "body": piece, "more_body": True})
                except RegistryError as error:
                    log.warning("the download of %s breaks off: %s", self._archive.file_name, error)
                    return
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def is_not_modified(archive: ImageArchive, headers: Mapping[str, str]) -> bool:
    """Returns whether the client has the archive already (RFC 9110, 13.1.2)."""
    known = headers.get("if-none-match", "")
    return known.strip() == "*" or archive.etag in (tag.strip().removeprefix("W/") for tag in known.split(","))


def _requested_span(archive: ImageArchive, headers: Mapping[str, str]) -> tuple[int, int] | None:
    """Returns the offsets of the first byte that the client asks for, and of the byte after the last one; None if it
    asks for the whole archive, or for the rest of another one (If-Range)."""
    found = _RANGE.fullmatch(headers.get("range", "").strip())
    if found is None or headers.get("if-range", archive.etag).strip() != archive.etag:
        return None
    first, last, suffix = found.groups()
    if suffix is not None:
        start, stop = max(0, archive.size - int(suffix)), archive.size
    else:
        start, stop = int(first), min(archive.size, int(last) + 1) if last else archive.size
    if start >= stop:
        raise RangeInvalid(f"the archive has {archive.size} bytes; no byte of it lies in that range", size=archive.size)
    return start, stop
