"""Upload sessions: start, mount, chunks, status, close, cancel (OCI distribution spec, end-4 to end-6, end-11, 13, 14).

Everything that can be checked without the body is checked before it is read. A client that disconnects midway gets no
answer; its session keeps what was received. Once the body is complete, a disconnect no longer matters: the commit runs
to its end, and a client that lost the answer finds the blob.
"""

from __future__ import annotations

from contextlib import aclosing, suppress

from registry.http import fields
from registry.http.asgi import Header
from registry.http.disconnect import ClientGone
from registry.http.exchange import Exchange
from registry.http.headers import content_headers, upload_headers
from storage.content import Descriptor
from storage.errors import BlobUnknown, BlobUploadInvalid, DigestInvalid, NameUnknown, RegistryError, SizeInvalid
from storage.interface import BlobWriter
from storage.names import Digest, RepositoryName, UploadID, as_algorithm
from storage.patterns import ALL_NAMES

CANCEL_TRIES = 5


async def start_upload(exchange: Exchange) -> None:
    """Mounts a blob, stores a whole one, or starts a session, by the query. A mount that is not possible becomes a
    session ("Mounting a blob from another repository")."""
    mount, digest = fields.read_digest(exchange, "mount"), fields.read_digest(exchange, "digest")
    algorithm = _read_algorithm(exchange, digest or mount)
    if mount is not None:
        given = exchange.query.one("from")
        source = RepositoryName(given) if given else ALL_NAMES
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
            await _store_whole(exchange, writer, digest)


async def append_chunk(exchange: Exchange) -> None:
    """Appends a chunk: at the place of its Content-Range, or after the last one."""
    upload = UploadID(exchange.item)
    chunk = fields.read_content_range(exchange)
    writer = await exchange.registry.resume_upload(
        exchange.repo, upload, chunk[0] if chunk else None, by=exchange.actor
    )
    async with aclosing(writer):
        await _write_body(exchange, writer, chunk[1] if chunk else None)
    await exchange.send_empty(202, *_session_headers(exchange, upload, writer.offset))


async def close_upload(exchange: Exchange) -> None:
    """Closes a session, with or without a last chunk, and stores the blob."""
    upload = UploadID(exchange.item)
    digest = fields.read_digest(exchange, "digest")
    if digest is None:
        raise DigestInvalid("the closing PUT names no digest: add ?digest= to it")
    chunk = fields.read_content_range(exchange)
    writer = await exchange.registry.resume_upload(
        exchange.repo, upload, chunk[0] if chunk else None, by=exchange.actor
    )
    async with aclosing(writer):
        await _write_body(exchange, writer, chunk[1] if chunk else None)
        stored = await writer.commit(digest)
    await _send_blob(exchange, stored)


async def get_upload(exchange: Exchange) -> None:
    """Reports a session's progress. Does not disturb a request that writes to it."""
    upload = UploadID(exchange.item)
    offset = await exchange.registry.upload_offset(exchange.repo, upload, by=exchange.actor)
    await exchange.send_empty(204, *_session_headers(exchange, upload, offset))


async def cancel_upload(exchange: Exchange) -> None:
    """Cancels a session. An earlier request, whose connection the client has given up, may still arrive and take the
    session over; so this tries several times."""
    upload = UploadID(exchange.item)
    for left in reversed(range(CANCEL_TRIES)):
        writer = await exchange.registry.resume_upload(exchange.repo, upload, by=exchange.actor)
        try:
            async with aclosing(writer):
                await writer.cancel()
        except BlobUploadInvalid:
            if not left:
                raise
        else:
            break
    await exchange.send_empty(204)


def _read_algorithm(exchange: Exchange, digest: Digest | None) -> str:
    given = exchange.query.one("digest-algorithm")
    if given is None:
        return digest.algorithm if digest else "sha256"
    if digest and as_algorithm(given) != digest.algorithm:
        raise DigestInvalid(f"digest-algorithm is {given}, but the digest's is {digest.algorithm}")
    return as_algorithm(given)


async def _store_whole(exchange: Exchange, writer: BlobWriter, digest: Digest) -> None:
    """Stores a blob from a single POST. The client does not know the session, so a failure cancels it."""
    try:
        await _write_body(exchange, writer, None)
    except (ClientGone, RegistryError):
        with suppress(RegistryError):  # the client gets the first error
            await writer.cancel()
        raise
    await _send_blob(exchange, await writer.commit(digest))


async def _write_body(exchange: Exchange, writer: BlobWriter, declared: int | None) -> None:
    """Writes the body to the session. `declared`: the length by Content-Range. Raises SizeInvalid for another length;
    the session keeps the received bytes, up to the declared length."""
    left = declared
    async for data in exchange.body():
        if left is None:
            await writer.write(data)
            continue
        if data[:left]:
            await writer.write(data[:left])
        if len(data) > left:
            raise SizeInvalid(f"the body is longer than the {declared} bytes that Content-Range declares")
        left -= len(data)
    if left:
        raise SizeInvalid(f"the body is {left} bytes shorter than Content-Range declares")


async def _send_blob(exchange: Exchange, stored: Descriptor) -> None:
    location = (b"location", exchange.location("blobs", stored.digest))
    await exchange.send_empty(201, location, *content_headers(stored.digest))


def _session_headers(exchange: Exchange, upload: str, offset: int) -> list[Header]:
    return upload_headers(exchange.location("blobs/uploads", upload), upload, offset)
