"""Upload sessions: start, mount, chunks, status, close, cancel (OCI distribution spec, end-4 to end-6, end-11, 13, 14).

What can be checked without the body is checked before it is read. A client that leaves midway gets no answer; its
session keeps what came. Once the body is whole nothing looks at the client any more: a commit goes through to its end,
and a client that lost the answer finds the blob there.
"""

from __future__ import annotations

from contextlib import aclosing, suppress

from registry.http import fields
from registry.http.exchange import ClientGone, Exchange
from registry.http.responses import content_headers, send_empty, upload_headers
from storage.content import Descriptor
from storage.errors import BlobUnknown, BlobUploadInvalid, DigestInvalid, NameUnknown, RegistryError, SizeInvalid
from storage.interface import BlobWriter
from storage.names import Digest, RepositoryName, UploadID, as_algorithm
from storage.patterns import ALL_NAMES

CANCEL_TRIES = 5


async def start_upload(exchange: Exchange) -> None:
    """Mounts a blob, or takes a whole one, or starts a session, whatever the query asks for. A mount that cannot be
    done becomes a session ("Mounting a blob from another repository")."""
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
            await send_empty(exchange, 202, *upload_headers(exchange, writer.id, writer.offset))
        else:
            await _take_whole(exchange, writer, digest)


async def append_chunk(exchange: Exchange) -> None:
    """A chunk: with Content-Range at its place, without one as the next."""
    upload = UploadID(exchange.item)
    chunk = fields.read_content_range(exchange)
    writer = await exchange.registry.resume_upload(
        exchange.repo, upload, chunk[0] if chunk else None, by=exchange.actor
    )
    async with aclosing(writer):
        await _write_body(exchange, writer, chunk[1] if chunk else None)
    await send_empty(exchange, 202, *upload_headers(exchange, upload, writer.offset))


async def close_upload(exchange: Exchange) -> None:
    """The end of a session, with or without a last chunk."""
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
    """Where the session stands. Nobody who is writing to it is disturbed."""
    upload = UploadID(exchange.item)
    offset = await exchange.registry.upload_offset(exchange.repo, upload, by=exchange.actor)
    await send_empty(exchange, 204, *upload_headers(exchange, upload, offset))


async def cancel_upload(exchange: Exchange) -> None:
    """A request whose connection broke, and which the client takes for dead, may still be on its way to the session and
    take it over from this one: then once more."""
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
    await send_empty(exchange, 204)


def _read_algorithm(exchange: Exchange, digest: Digest | None) -> str:
    given = exchange.query.one("digest-algorithm")
    if given is None:
        return digest.algorithm if digest else "sha256"
    if digest and as_algorithm(given) != digest.algorithm:
        raise DigestInvalid(f"digest-algorithm is {given}, but the digest's is {digest.algorithm}")
    return as_algorithm(given)


async def _take_whole(exchange: Exchange, writer: BlobWriter, digest: Digest) -> None:
    """A blob in a single POST. Nobody was told of the session, so it does not outlive a failure."""
    try:
        await _write_body(exchange, writer, None)
    except (ClientGone, RegistryError):
        with suppress(RegistryError):  # what went wrong first is what the client is told
            await writer.cancel()
        raise
    await _send_blob(exchange, await writer.commit(digest))


async def _write_body(exchange: Exchange, writer: BlobWriter, declared: int | None) -> None:
    """Takes the body, of which `declared` bytes are announced. Raises SizeInvalid when they are more or fewer; the
    session keeps those that came, up to the declared length, and its status says so."""
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
    location = (b"location", exchange.locate("blobs", stored.digest))
    await send_empty(exchange, 201, location, *content_headers(stored.digest))
