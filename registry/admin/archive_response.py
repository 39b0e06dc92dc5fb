"""Responses that take much time or memory to send. `ArchiveResponse` sends an image as a tar archive, or only the range
of the archive that the client requests (RFC 9110, 14). `InMemoryResponse` sends a manifest or config."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import Final, NoReturn

from starlette.responses import Response

from registry.asgi import Message, Receive, Scope, Send
from registry.browse.answer_memory_limit import AnswerMemoryLimit
from registry.browse.image_archive import ImageArchive
from registry.browse.repository_browser import as_current_request, visitor_of
from registry.log_output import mark_logged
from registry.request import RequestContext
from storage.errors import RangeInvalid, RegistryError, TooManyRequests

log = logging.getLogger("registry.management")

_RANGE: Final = re.compile(r"bytes=(?:([0-9]{1,18})-([0-9]{0,18})|-([0-9]{1,18}))")
"""Matches a Range header with one range. A client that requests several ranges gets the whole archive."""
_SLOW_BYTES: Final = 256 * 1024
_SLOW_SECONDS: Final = 30.0
"""A client is slow if it needs at least this many seconds to receive `_SLOW_BYTES`."""


class ResponseCutOff(Exception):
    """The registry breaks off a response, and has logged the reason. The server then closes the connection, so that the
    client notices the incomplete response."""

    def __init__(self) -> None:
        super().__init__()
        mark_logged(self)


class RunningDownload:
    """An archive that is being sent. Measures how long the client needs to receive each *portion* of at least
    `_SLOW_BYTES` bytes. `visitor`: a text that identifies the client's account or network."""

    def __init__(self, visitor: str, end: Callable[[], None]) -> None:
        """`end`: a function that ends the download; called at most once."""
        self.visitor = visitor
        self._end: Callable[[], None] | None = end
        self._portion_bytes = 0
        self._portion_seconds = 0.0
        self._sending_since: float | None = None
        """When the present `with` block of the method `sending` began, by the event loop's clock; None outside such a
        block."""

    @contextmanager
    def sending(self, byte_count: int) -> Iterator[None]:
        """A context manager for a block that sends `byte_count` bytes. Measures how long the block takes."""
        time = asyncio.get_running_loop().time
        started = self._sending_since = time()
        try:
            yield
        finally:
            self._portion_seconds += time() - started
            self._sending_since = None
        self._portion_bytes += byte_count
        if self._portion_bytes >= _SLOW_BYTES:
            self._portion_bytes, self._portion_seconds = 0, 0.0

    def receive_seconds(self, now: float) -> float:
        """Returns for how many seconds the client has been receiving the current portion. The time in which the
        registry reads the bytes does not count. `now`: the present time of the event loop's clock."""
        return self._portion_seconds + (0.0 if self._sending_since is None else now - self._sending_since)

    def end(self) -> None:
        """Ends the download. Idempotent."""
        end, self._end = self._end, None
        if end is not None:
            end()


class RunningDownloads:
    """The archives that this process sends. Each download holds a *slot*. `limit`: the number of slots. The downloads
    of one visitor may hold half of the slots, rounded up. If no slot is free for a new download, a slow client loses
    its slot."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._limit_per_visitor = (limit + 1) // 2
        self._running: set[RunningDownload] = set()

    @asynccontextmanager
    async def slot(self, visitor: str) -> AsyncIterator[RunningDownload]:
        """A context manager that holds a slot for a download. `visitor`: identifies the client
        (`registry.browse.repository_browser.visitor_of`).

        Raises TooManyRequests in two cases:

        - The visitor's downloads hold all slots that one visitor may have.
        - No slot is free.

        If a running download has a slow client (`_SLOW_SECONDS`), this method ends the slowest such download before it
        raises the error, so that the refused visitor can get a slot at the next attempt. In the first case, it ends
        only a download of the same visitor.

        `RunningDownload.end` cancels the `async with` block. The `async with` statement then ends without an error."""
        own_downloads = [download for download in self._running if download.visitor == visitor]
        if len(own_downloads) >= self._limit_per_visitor:
            self._refuse(own_downloads)
        if len(self._running) >= self._limit:
            self._refuse(self._running)
        timeout = asyncio.timeout(None)
        now = asyncio.get_running_loop().time
        # To end the download, let the timeout expire now, which cancels the block.
        download = RunningDownload(visitor, lambda: timeout.reschedule(now()))
        self._running.add(download)
        try:
            async with timeout:
                yield download
        except TimeoutError:
            if not timeout.expired():
                raise
            log.info("stopped a download for %s: the client receives too slowly, and others need the slot", visitor)
        finally:
            self._running.discard(download)

    def _refuse(self, downloads: Iterable[RunningDownload]) -> NoReturn:
        """Raises TooManyRequests. First ends the slowest of `downloads` if its client is slow."""
        now = asyncio.get_running_loop().time()
        slowest = max(downloads, key=lambda download: download.receive_seconds(now))
        is_slow = slowest.receive_seconds(now) >= _SLOW_SECONDS
        if is_slow:
            slowest.end()
        raise TooManyRequests(
            "too many images are being downloaded; try again in a moment", retry_after=1 if is_slow else 30
        )


class ArchiveResponse(Response):
    """Sends an archive, or the range that the client requests. Produces the archive while it sends, and holds only one
    piece of a blob in memory."""

    media_type = "application/x-tar"

    def __init__(
        self,
        open_archive: Callable[[], Awaitable[ImageArchive]],
        request: RequestContext,
        headers: Mapping[str, str],
        downloads: RunningDownloads,
    ) -> None:
        """`open_archive`: returns the archive; called when the download has a slot. `headers`: the headers of the HTTP
        request. `request`: the context of the HTTP request. `request.principal` is the account or anonymous
        client that makes the request. The rights of this principal are checked for each blob of the archive."""
        super().__init__()
        self._open_archive = open_archive
        self._request = request
        self._request_headers = headers
        self._downloads = downloads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the response. Raises:

        - TooManyRequests: there is no slot for the download (`RunningDownloads.slot`).
        - RangeInvalid: the requested range contains no byte of the archive.
        - ResponseCutOff: a blob cannot be read, or the client is too slow.
        - The errors of `open_archive`."""
        async with self._downloads.slot(visitor_of(self._request)) as download:
            archive = await self._open_archive()
            if is_not_modified(archive, self._request_headers):
                await Response(status_code=304, headers={"ETag": archive.etag})(scope, receive, send)
                return
            span = _requested_span(archive, self._request_headers)
            await send(self._start_message(archive, span))
            with as_current_request(self._request):
                async with aclosing(archive.read(*(span or (0, archive.size)))) as pieces:
                    try:
                        async for piece in pieces:
                            with download.sending(len(piece)):
                                await send({"type": "http.response.body", "body": piece, "more_body": True})
                    except RegistryError as error:
                        log.warning("the download of %s breaks off: %s", archive.file_name, error)
                        raise ResponseCutOff from None
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            return
        # Reached only if `RunningDownload.end` has cancelled the block.
        raise ResponseCutOff

    def _start_message(self, archive: ImageArchive, span: tuple[int, int] | None) -> Message:
        """Returns the ASGI message with the status and the headers. `span`: the offsets of the first byte to send and
        of the byte after the last one; None: the whole archive."""
        start, stop = span or (0, archive.size)
        headers = {
            "Accept-Ranges": "bytes",
            "Content-Disposition": f'attachment; filename="{archive.file_name}"',
            "Content-Length": str(stop - start),
            "ETag": archive.etag,
        }
        if span is not None:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{archive.size}"
        status = 200 if span is None else 206
        head = Response(status_code=status, headers=headers, media_type=self.media_type)
        return {"type": "http.response.start", "status": status, "headers": head.raw_headers}


class InMemoryResponse(Response):
    """Sends a manifest or config. Holds the bytes in memory until the client has received them. `AnswerMemoryLimit`
    limits the memory for all such responses together."""

    media_type = "application/json"

    def __init__(
        self, body: bytes, memory_limit: AnswerMemoryLimit, visitor: str, headers: Mapping[str, str] | None = None
    ) -> None:
        """`visitor`: identifies the client (`registry.browse.repository_browser.visitor_of`)."""
        super().__init__(body, headers=headers)
        self._memory_limit = memory_limit
        self._visitor = visitor

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the response. Raises TooManyRequests if there is too little memory. Raises ResponseCutOff if the client
        is too slow (`AnswerMemoryLimit.hold`)."""
        async with self._memory_limit.hold(self._visitor, len(self.body)):
            await super().__call__(scope, receive, send)
            return
        raise ResponseCutOff


def is_not_modified(archive: ImageArchive, headers: Mapping[str, str]) -> bool:
    """Returns whether the request's If-None-Match header names the ETag of the archive or `*` (RFC 9110, 13.1.2)."""
    client_etags = headers.get("if-none-match", "")
    return client_etags.strip() == "*" or archive.etag in (
        tag.strip().removeprefix("W/") for tag in client_etags.split(",")
    )


def _requested_span(archive: ImageArchive, headers: Mapping[str, str]) -> tuple[int, int] | None:
    """Returns the requested range: the offsets of its first byte and of the byte after its last one. Raises
    RangeInvalid if the range contains no byte of the archive. Returns None if the whole archive has to be sent:

    - The request has no Range header, or the header is not one valid range.
    - The If-Range header names another version of the archive."""
    match = _RANGE.fullmatch(headers.get("range", "").strip())
    if match is None or headers.get("if-range", archive.etag).strip() != archive.etag:
        return None
    first, last, suffix = match.groups()
    if suffix is not None:
        start, stop = max(0, archive.size - int(suffix)), archive.size
    else:
        start, stop = int(first), min(archive.size, int(last) + 1) if last else archive.size
    if start >= stop:
        raise RangeInvalid(
            f"the archive has {archive.size} bytes; the requested range contains none of them", size=archive.size
        )
    return start, stop
