"""Handlers of upload sessions, and of blob mounts (OCI distribution spec, end-4 to end-6, end-11, end-13, end-14).

A handler checks the path, the query and the headers before it reads the body. If the client disconnects in the middle
of a body, the session keeps the received bytes; only a POST that sends a whole blob keeps nothing. If the client
disconnects after the end of the body, the blob is stored all the same, and the client finds it on its next attempt.
"""

from __future__ import annotations

from contextlib import aclosing, suppress

from registry.asgi import Header
from registry.http.disconnect import ClientGone
from registry.http.exchange import Exchange
from registry.http.range_headers import read_content_range
from registry.http.response_headers import content_headers, upload_headers
from storage.content import Descriptor
from storage.errors import BlobUnknown, BlobUploadInvalid, DigestInvalid, NameUnknown, RegistryError, SizeInvalid
from storage.interface import BlobWriter
from storage.names import Digest, RepositoryName, UploadID, as_algorithm
from storage.patterns import ALL_NAMES

CANCEL_ATTEMPTS = 5
"""Attempts to cancel a session that another request takes over each time."""


async def start_upload(exchange: Exchange) -> None:
    """Answers POST. Its query decides: `mount` mounts a blob of another repository, `digest` stores the body as a blob,
    and without both an upload session starts. If the blob cannot be mounted, an upload session starts as well
    ("Mounting a blob from another repository")."""
    mount, digest = _read_digest(exchange, "mount"), _read_digest(exchange, "digest")
    algorithm = _read_algorithm(exchange, digest or mount)
    if mount is not None:
        from_name = exchange.query.one("from")
        source = RepositoryName(from_name) if from_name else ALL_NAMES
        try:
            await _send_blob(exchange, await exchange.registry.mount_blob(exchange.repo, mount, source, exchange.actor))
        except (BlobUnknown, NameUnknown):
            pass
        else:
            return
    writer = await exchange.registry.start_upload(exchange.repo, algorithm, by=exchange.actor)
    async with aclosing(writer):
        if digest is None:
            await exchange.send_empty(202, *_session_headers(exchange, writer.id, writer.offset))
        else:
            await _store_blob(exchange, writer, digest)


async def append_chunk(exchange: Exchange) -> None:
    """Appends the body to a session, at the session's end. Content-Range, if given, must start there (416
    otherwise)."""
    upload = UploadID(exchange.item)
    chunk = read_content_range(exchange)
    writer = await exchange.registry.resume_upload(
        exchange.repo, upload, chunk[0] if chunk else None, by=exchange.actor
    )
    async with aclosing(writer):
        await _write_body(exchange, writer, chunk[1] if chunk else None)
    await exchange.send_empty(202, *_session_headers(exchange, upload, writer.offset))


async def close_upload(exchange: Exchange) -> None:
    """Appends the body, which may be empty, to a session, stores the session's bytes as a blob, and ends the
    session."""
    upload = UploadID(exchange.item)
    digest = _read_digest(exchange, "digest")
    if digest is None:
        raise DigestInvalid("the closing PUT names no digest: add ?digest= to it")
    chunk = read_content_range(exchange)
    writer = await exchange.registry.resume_upload(
        exchange.repo, upload, chunk[0] if chunk else None, by=exchange.actor
    )
    async with aclosing(writer):
        await _write_body(exchange, writer, chunk[1] if chunk else None)
        stored = await writer.commit(digest)
    await _send_blob(exchange, stored)


async def get_upload(exchange: Exchange) -> None:
    """Reports how many bytes a session has. Does not disturb a request that is writing to the session."""
    upload = UploadID(exchange.item)
    offset = await exchange.registry.upload_offset(exchange.repo, upload, by=exchange.actor)
    await exchange.send_empty(204, *_session_headers(exchange, upload, offset))


async def cancel_upload(exchange: Exchange) -> None:
    """Cancels a session. Tries several times, because an earlier request of the client may still be processed and take
    the session over in between."""
    upload = UploadID(exchange.item)
    for attempt in range(1, CANCEL_ATTEMPTS + 1):
        writer = await exchange.registry.resume_upload(exchange.repo, upload, by=exchange.actor)
        try:
            async with aclosing(writer):
                await writer.cancel()
        except BlobUploadInvalid:
            if attempt == CANCEL_ATTEMPTS:
                raise
        else:
            break
    await exchange.send_empty(204)


def _read_digest(exchange: Exchange, parameter: str) -> Digest | None:
    """Returns the digest in a query parameter; None without the parameter. Raises DigestInvalid, also if the parameter
    occurs twice."""
    values = exchange.query.all(parameter)
    if len(values) > 1:
        raise DigestInvalid(f"the query gives {parameter} {len(values)} times; give it only once")
    return Digest(values[0]) if values else None


def _read_algorithm(exchange: Exchange, digest: Digest | None) -> str:
    """Returns the digest algorithm for a new session: `digest-algorithm` of the query, that of `digest`, or sha256.
    Raises DigestInvalid if the first two differ."""
    requested = exchange.query.one("digest-algorithm")
    if requested is None:
        return digest.algorithm if digest else "sha256"
    if digest and as_algorithm(requested) != digest.algorithm:
        raise DigestInvalid(f"digest-algorithm is {requested}, but the digest's is {digest.algorithm}")
    return as_algorithm(requested)


async def _store_blob(exchange: Exchange, writer: BlobWriter, digest: Digest) -> None:
    """Stores the body of a POST as a blob. A failure cancels the session, because its client does not know the
    session's id and could not continue it."""
    try:
        await _write_body(exchange, writer, None)
    except (ClientGone, RegistryError):
        with suppress(RegistryError):  # the error that is answered is the first one
            await writer.cancel()
        raise
    await _send_blob(exchange, await writer.commit(digest))


async def _write_body(exchange: Exchange, writer: BlobWriter, declared_bytes: int | None) -> None:
    """Writes the request's body to the session.

    `declared_bytes`: the length by Content-Range; None: the request has no Content-Range. Raises SizeInvalid if the
    body has another length; the session keeps the received bytes, up to the declared length. Raises ClientGone, and the
    errors of `BlobWriter.write`."""
    remaining_bytes = declared_bytes
    async for data in exchange.body():
        if remaining_bytes is None:
            await writer.write(data)
            continue
        if data[:remaining_bytes]:
            await writer.write(data[:remaining_bytes])
        if len(data) > remaining_bytes:
            raise SizeInvalid(f"the body is longer than the {declared_bytes} bytes that Content-Range declares")
        remaining_bytes -= len(data)
    if remaining_bytes:
        raise SizeInvalid(f"the body is {remaining_bytes} bytes shorter than Content-Range declares")


async def _send_blob(exchange: Exchange, stored: Descriptor) -> None:
    """Sends 201 for a blob that has been stored or mounted."""
    location = (b"location", exchange.location("blobs", stored.digest))
    await exchange.send_empty(201, location, *content_headers(stored.digest))


def _session_headers(exchange: Exchange, upload: str, offset: int) -> list[Header]:
    """Returns the headers that tell a client the session's URL and how many bytes (`offset`) it has."""
    return upload_headers(exchange.location("blobs/uploads", upload), upload, offset)
