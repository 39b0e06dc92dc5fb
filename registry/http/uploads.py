"""Handlers of upload sessions, and of blob mounts (OCI distribution spec, end-4 to end-6, end-11, end-13, end-14).

A handler checks the path, the query and the headers before it receives the body. It sets `exchange.announced_blob` to
the size and digest that the request states. If a blob of this size does not fit into the store, the registry refuses
the request before the body arrives (`registry.upkeep.admission`).

What is stored if the client disconnects:
- During the body of a PATCH or PUT: the received bytes. The client can continue the session after these bytes.
- During the body of a POST that sends a whole blob: nothing.
- After the whole body of a PUT, or of a POST that sends a whole blob: the blob.
"""

from __future__ import annotations

from contextlib import aclosing, suppress

from registry.asgi import Header
from registry.http.disconnect import ClientGone
from registry.http.exchange import Exchange
from registry.http.range_headers import read_content_range
from registry.http.response_headers import content_headers, upload_headers
from registry.request import AnnouncedBlob
from storage.content import Descriptor
from storage.errors import BlobUnknown, BlobUploadInvalid, DigestInvalid, NameUnknown, RegistryError, SizeInvalid
from storage.interface import BlobWriter
from storage.names import Digest, RepositoryName, UploadID, as_algorithm
from storage.patterns import ALL_NAMES

CANCEL_ATTEMPTS = 5
"""Number of attempts to cancel a session. An attempt resumes the session and then cancels it. The attempt fails if
another request resumes the session between these two steps."""


async def start_upload(exchange: Exchange) -> None:
    """Answers a POST, depending on its query:

    - `mount`: mounts a blob of another repository. If the blob cannot be mounted, ignores `mount` (section "Mounting a
      blob from another repository" of the spec).
    - `digest`: stores the body as a blob.
    - neither: starts an upload session."""
    mount, digest = _read_digest(exchange, "mount"), _read_digest(exchange, "digest")
    algorithm = _read_algorithm(exchange, digest or mount)
    if mount is not None:
        from_name = exchange.query.one("from")
        # Without `from`, the source can be any repository from which the client may pull.
        source = RepositoryName(from_name) if from_name else ALL_NAMES
        try:
            await _send_201(exchange, await exchange.registry.mount_blob(exchange.repo, mount, source, exchange.actor))
        except (BlobUnknown, NameUnknown):
            pass  # the client has to upload the blob
        else:
            return
    if digest is not None:
        exchange.announced_blob = AnnouncedBlob(exchange.length, digest)
    writer = await exchange.registry.start_upload(exchange.repo, algorithm, by=exchange.actor)
    async with aclosing(writer):
        if digest is None:
            await exchange.send_empty(202, *_session_headers(exchange, writer.id, writer.offset))
        else:
            await _store_blob(exchange, writer, digest)


async def append_chunk(exchange: Exchange) -> None:
    """Appends the body to a session. A request whose Content-Range does not start at the session's end gets 416."""
    upload_id = UploadID(exchange.resource_id)
    offset, declared_bytes = read_content_range(exchange) or (None, None)
    exchange.announced_blob = AnnouncedBlob(exchange.length, None)
    writer = await exchange.registry.resume_upload(exchange.repo, upload_id, offset, by=exchange.actor)
    async with aclosing(writer):
        await _write_body(exchange, writer, declared_bytes)
    await exchange.send_empty(202, *_session_headers(exchange, upload_id, writer.offset))


async def close_upload(exchange: Exchange) -> None:
    """Appends the body, which may be empty, to a session. Then stores all bytes of the session as a blob and ends the
    session."""
    upload_id = UploadID(exchange.resource_id)
    digest = _read_digest(exchange, "digest")
    if digest is None:
        raise DigestInvalid("the PUT that ends the upload names no digest; add ?digest=DIGEST to its URL")
    offset, declared_bytes = read_content_range(exchange) or (None, None)
    exchange.announced_blob = AnnouncedBlob(exchange.length, digest)
    writer = await exchange.registry.resume_upload(exchange.repo, upload_id, offset, by=exchange.actor)
    async with aclosing(writer):
        await _write_body(exchange, writer, declared_bytes)
        stored = await writer.commit(digest)
    await _send_201(exchange, stored)


async def get_upload(exchange: Exchange) -> None:
    """Sends the number of bytes that a session has received. If another request is writing to the session, that request
    continues."""
    upload_id = UploadID(exchange.resource_id)
    offset = await exchange.registry.upload_offset(exchange.repo, upload_id, by=exchange.actor)
    await exchange.send_empty(204, *_session_headers(exchange, upload_id, offset))


async def cancel_upload(exchange: Exchange) -> None:
    """Cancels a session. If another request is writing to the session, first takes the session over from that request.
    Makes up to `CANCEL_ATTEMPTS` attempts."""
    upload_id = UploadID(exchange.resource_id)
    for attempt in range(1, CANCEL_ATTEMPTS + 1):
        try:
            writer = await exchange.registry.resume_upload(exchange.repo, upload_id, by=exchange.actor)
            async with aclosing(writer):
                await writer.cancel()
        except BlobUploadInvalid:
            if attempt == CANCEL_ATTEMPTS:
                raise
        else:
            break
    await exchange.send_empty(204)


def _read_digest(exchange: Exchange, parameter: str) -> Digest | None:
    """Returns the digest in a query parameter. Returns None if the query does not have the parameter. Raises
    DigestInvalid if the value is no digest, or if the query has the parameter more than once."""
    values = exchange.query.all(parameter)
    if len(values) > 1:
        raise DigestInvalid(f"the query gives {parameter} {len(values)} times; give it only once")
    return Digest(values[0]) if values else None


def _read_algorithm(exchange: Exchange, digest: Digest | None) -> str:
    """Returns the digest algorithm for a new session: the query parameter `digest-algorithm`; without it, the algorithm
    of `digest`; without both, sha256. Raises DigestInvalid if `digest-algorithm` differs from the algorithm of
    `digest`, or is not supported."""
    requested = exchange.query.one("digest-algorithm")
    if requested is None:
        return digest.algorithm if digest else "sha256"
    if digest and as_algorithm(requested) != digest.algorithm:
        raise DigestInvalid(f"digest-algorithm is {requested}, but the algorithm of the digest is {digest.algorithm}")
    return as_algorithm(requested)


async def _store_blob(exchange: Exchange, writer: BlobWriter, digest: Digest) -> None:
    """Stores the body of a POST as a blob. If the body cannot be received or written, cancels the session: the client
    does not know the session's id, so it could not continue the session."""
    try:
        await _write_body(exchange, writer, declared_bytes=None)
    except (ClientGone, RegistryError):
        with suppress(RegistryError):  # the client gets the first error
            await writer.cancel()
        raise
    await _send_201(exchange, await writer.commit(digest))


async def _write_body(exchange: Exchange, writer: BlobWriter, declared_bytes: int | None) -> None:
    """Writes the request's body to the session.

    `declared_bytes` is the length of the body according to Content-Range, or None if the request has no Content-Range.
    If the body has another length, raises SizeInvalid; the session then keeps the received bytes up to the declared
    length. Also raises ClientGone, and the errors of `BlobWriter.write`."""
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


async def _send_201(exchange: Exchange, stored: Descriptor) -> None:
    """Sends 201 for a blob that has been stored or mounted."""
    location = (b"location", exchange.location("blobs", stored.digest))
    await exchange.send_empty(201, location, *content_headers(stored.digest))


def _session_headers(exchange: Exchange, upload_id: str, offset: int) -> list[Header]:
    """Returns the headers that give the URL of a session and the number of bytes that the session has (`offset`)."""
    return upload_headers(exchange.location("blobs/uploads", upload_id), upload_id, offset)
