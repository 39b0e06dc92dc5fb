"""What a far registry answered, and which of our errors that is.

What a far registry sends as JSON, read so that nobody waits for it: what is large in a thread, one at a time.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from registry.mirror.upstream_client import UnconfirmedBlobUnknown, UnconfirmedManifestUnknown, UnconfirmedNameUnknown
from registry.upstream.destinations import NetworkClass, loggable_origin
from storage.content import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    INDEXES,
    MANIFESTS,
    OCI_INDEX,
    OCI_MANIFEST,
    Descriptor,
    Manifest,
)
from storage.errors import (
    BlobUnknown,
    Denied,
    DigestInvalid,
    ManifestInvalid,
    ManifestUnknown,
    NameUnknown,
    RegistryError,
    UpstreamUnavailable,
)
from storage.json_bounds import SMALL
from storage.names import Digest, Reference

ACCEPTED_MANIFESTS = ", ".join((OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST))
"""Every manifest type but schema 1. Without it registries convert, and the digest is another."""

_UNKNOWN_CODES = frozenset({"MANIFEST_UNKNOWN", "BLOB_UNKNOWN", "NAME_UNKNOWN", "NAME_INVALID"})
_REFUSAL_CODES = _UNKNOWN_CODES | {"UNAUTHORIZED", "DENIED", "UNSUPPORTED", "TAG_INVALID", "NOT_FOUND", "FORBIDDEN"}
"""Codes of refusals: the OCI distribution spec's ("Error Codes"), and those that Docker's registry and Harbor add."""
_MAX_ERROR_BODY = 64 << 10
"""Bytes of an answer that may hold codes; what is larger is some page."""


@dataclass(frozen=True, slots=True)
class UpstreamResponse:
    """A response. Header names are in lower case; fields sent more than once are joined with ", "."""

    status: int
    headers: Mapping[str, str]
    url: str
    """Which address answered, after redirects."""
    is_foreign: bool
    """Another origin than the one asked answered."""
    body: bytes = b""
    network: NetworkClass = NetworkClass.PUBLIC
    """Where a redirect, a next page or a token service named by this answer may be, beside public addresses."""

    @property
    def length(self) -> int | None:
        return parse_count(self.headers.get("content-length"))

    @property
    def digest(self) -> Digest | None:
        """`Docker-Content-Digest`; None where there is none, or none of an algorithm known here."""
        try:
            return Digest(self.headers.get("docker-content-digest", "").strip())
        except DigestInvalid:
            return None

    @property
    def media_type(self) -> str | None:
        """The Content-Type, where it is a manifest's."""
        kind = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        return kind if kind in MANIFESTS | INDEXES else None


def parse_count(text: str | None) -> int | None:
    """A count of bytes, as headers write it; None for anything else."""
    text = (text or "").strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


def error_of(answer: UpstreamResponse, unknown: RegistryError, login: bool, granted: bool = False) -> RegistryError:
    """The error for an answer that is no success. `unknown`: what "there is no such thing" means here. `login`: we
    are not anonymous there, so a refusal is one of the login configured. `granted`: the request carried a token that
    the registry's token service gave for it."""
    status, where = answer.status, loggable_origin(answer.url)
    if answer.is_foreign and status in (401, 403):
        # A redirect's address carries its own authorisation, so this says nothing about who we are.
        return UpstreamUnavailable(f"the upstream sent us on to {where}, which refuses us ({status})")
    if status in (404, 410):
        return unknown if is_from_registry(answer) else as_unconfirmed(unknown)
    if status == 400 and _error_codes(answer.body) & _UNKNOWN_CODES:
        return unknown
    if status in (401, 403):
        if login:
            return login_denied(where)
        return unknown if _is_final(answer, granted) else as_unconfirmed(unknown)
    return UpstreamUnavailable(f"the upstream registry {where} answers {status}")


def _is_final(answer: UpstreamResponse, granted: bool) -> bool:
    """Whether a refusal of somebody anonymous says that there is no such thing for the anonymous: the registry has
    taken our token and finds that it is not enough, or it forbids without requester for a login. A refusal of the login
    itself (no token was got, the token is not accepted, or just UNAUTHORIZED) says nothing of the thing asked for."""
    challenge = answer.headers.get("www-authenticate", "")
    about_it = bool(_error_codes(answer.body) & (_REFUSAL_CODES - {"UNAUTHORIZED"}))
    if granted:
        return "insufficient_scope" in challenge or ("invalid_token" not in challenge and about_it)
    return answer.status == 403 and not challenge and about_it


def is_from_registry(answer: UpstreamResponse) -> bool:
    """Its body shows that a registry refuses, and not something before it. An answer to HEAD shows nothing."""
    return bool(_error_codes(answer.body) & _REFUSAL_CODES)


def as_unconfirmed(unknown: RegistryError) -> RegistryError:
    """The same where it is not sure that the registry said so. What is here is dropped, or not listed, and "unknown"
    is remembered, only when the upstream has it no more."""
    if isinstance(unknown, NameUnknown):
        return UnconfirmedNameUnknown()
    if isinstance(unknown, BlobUnknown):
        return UnconfirmedBlobUnknown()
    return UnconfirmedManifestUnknown() if isinstance(unknown, ManifestUnknown) else unknown


def login_denied(where: str) -> Denied:
    return Denied(f"the upstream registry {where} refuses the login configured for it")


def _error_codes(body: bytes) -> set[str]:
    """The error codes in a body (OCI distribution spec, "Error Codes")."""
    if len(body) > _MAX_ERROR_BODY:
        return set()
    try:
        errors = json.loads(body)["errors"]
        return {str(error["code"]) for error in errors}
    except (ValueError, LookupError, TypeError, RecursionError):
        return set()


T = TypeVar("T")


class DocumentParser:
    """One upstream's. A document may take ten times its own size in memory while it is read."""

    def __init__(self) -> None:
        self._turn = asyncio.Semaphore(1)

    async def run(self, size: int, read: Callable[[], T]) -> T:
        """What `read` gives, which reads a document of `size` bytes. Cancelled: it is not begun, or its outcome is
        dropped. Its turn ends with its thread."""
        if size <= SMALL:
            return read()
        await self._turn.acquire()
        try:
            reading = asyncio.get_running_loop().run_in_executor(None, read)
        except BaseException:
            self._turn.release()
            raise
        reading.add_done_callback(self._done)
        try:
            return await asyncio.shield(reading)
        finally:
            del reading  # its error holds this frame: the circle would hold the document until the collector comes by

    def _done(self, reading: asyncio.Future[T]) -> None:
        self._turn.release()
        if not reading.cancelled():
            reading.exception()  # is seen even where nobody waits any more

    async def verified_manifest(self, answer: UpstreamResponse, reference: Reference) -> Manifest:
        """The manifest, once its bytes have the digest asked for, or the one the answer names. Raises
        UpstreamUnavailable."""
        where = loggable_origin(answer.url)
        try:
            return await self._parse(answer, answer.media_type, _expected_digest(answer, reference))
        except DigestInvalid:
            raise UpstreamUnavailable(f"{where} sends a manifest whose bytes have another digest") from None
        except ManifestInvalid as error:
            raise UpstreamUnavailable(f"{where} sends a manifest that is not valid: {error.message}") from None

    async def descriptors(self, answer: UpstreamResponse) -> tuple[Descriptor, ...]:
        """Those of an index; none where it is another manifest. Raises UpstreamUnavailable."""
        try:
            index = await self._parse(answer, answer.media_type or OCI_INDEX, None)
        except ManifestInvalid as error:
            where = loggable_origin(answer.url)
            raise UpstreamUnavailable(f"{where} sends an index that is not valid: {error.message}") from None
        return tuple(index.manifests) if index.media_type in INDEXES else ()

    async def _parse(self, answer: UpstreamResponse, media_type: str | None, digest: Digest | None) -> Manifest:
        return await self.run(len(answer.body), lambda: Manifest.parse(answer.body, media_type, digest))


def _expected_digest(answer: UpstreamResponse, reference: Reference) -> Digest | None:
    return reference if isinstance(reference, Digest) else answer.digest
