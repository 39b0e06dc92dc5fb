"""Responses of upstream registries: the errors they map to (`error_of`), and the parsing of their JSON documents
(`DocumentParser`)."""

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
from storage.json_bounds import UNCHECKED_BYTES
from storage.names import Digest, Reference

ACCEPTED_MANIFESTS = ", ".join((OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST))
"""All manifest types but schema 1. Without this header registries convert manifests, which changes the digest."""

_UNKNOWN_CODES = frozenset({"MANIFEST_UNKNOWN", "BLOB_UNKNOWN", "NAME_UNKNOWN", "NAME_INVALID"})
_REFUSAL_CODES = _UNKNOWN_CODES | {"UNAUTHORIZED", "DENIED", "UNSUPPORTED", "TAG_INVALID", "NOT_FOUND", "FORBIDDEN"}
"""Error codes of refusals: those of the OCI distribution spec ("Error Codes"), and those that Docker's registry and
Harbor add."""
_MAX_ERROR_BODY = 64 << 10
"""Largest body, in bytes, that is searched for error codes; a larger one is some other page."""


@dataclass(frozen=True, slots=True)
class UpstreamResponse:
    """A response. Header names are in lower case; repeated fields are joined with ", "."""

    status: int
    headers: Mapping[str, str]
    url: str
    """The URL that responded, after redirects."""
    is_foreign: bool
    """Whether another origin than the requested one responded."""
    body: bytes = b""
    network: NetworkClass = NetworkClass.PUBLIC
    """The network, beside public addresses, where a redirect, a next page or a token service named by this response may
    be."""

    @property
    def length(self) -> int | None:
        return parse_count(self.headers.get("content-length"))

    @property
    def digest(self) -> Digest | None:
        """`Docker-Content-Digest`; None if there is none, or none of a known algorithm."""
        try:
            return Digest(self.headers.get("docker-content-digest", "").strip())
        except DigestInvalid:
            return None

    @property
    def media_type(self) -> str | None:
        """The Content-Type, if it is a manifest's."""
        kind = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        return kind if kind in MANIFESTS | INDEXES else None


def parse_count(text: str | None) -> int | None:
    """Parses a count of bytes in a header; None for anything else."""
    text = (text or "").strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


def error_of(answer: UpstreamResponse, unknown: RegistryError, login: bool, granted: bool = False) -> RegistryError:
    """Returns the error for an unsuccessful response. `unknown`: the error for "no such thing". `login`: the request
    had a login, so a refusal is a refusal of that login. `granted`: the request carried a token that the registry's
    token service issued for it."""
    status, where = answer.status, loggable_origin(answer.url)
    if answer.is_foreign and status in (401, 403):
        # The URL of a redirect carries its own authorisation, so this says nothing about our login.
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
    """Returns whether a refusal of an anonymous client means that there is nothing for anonymous clients: the registry
    accepted our token and finds it insufficient, or it forbids without asking for a login. A failed login (no token
    obtained, token not accepted, or only UNAUTHORIZED) says nothing about the content."""
    challenge = answer.headers.get("www-authenticate", "")
    about_it = bool(_error_codes(answer.body) & (_REFUSAL_CODES - {"UNAUTHORIZED"}))
    if granted:
        return "insufficient_scope" in challenge or ("invalid_token" not in challenge and about_it)
    return answer.status == 403 and not challenge and about_it


def is_from_registry(answer: UpstreamResponse) -> bool:
    """Returns whether the body shows that a registry refuses, rather than something in front of it. A response to HEAD
    shows nothing."""
    return bool(_error_codes(answer.body) & _REFUSAL_CODES)


def as_unconfirmed(unknown: RegistryError) -> RegistryError:
    """Returns the unconfirmed variant of an "unknown" error. Cached content is dropped or hidden, and "unknown" is
    cached, only when the registry itself says so."""
    if isinstance(unknown, NameUnknown):
        return UnconfirmedNameUnknown()
    if isinstance(unknown, BlobUnknown):
        return UnconfirmedBlobUnknown()
    return UnconfirmedManifestUnknown() if isinstance(unknown, ManifestUnknown) else unknown


def login_denied(where: str) -> Denied:
    """Returns the error for a refused login."""
    return Denied(f"the upstream registry {where} refuses the login configured for it")


def _error_codes(body: bytes) -> set[str]:
    """Returns the error codes in a body (OCI distribution spec, "Error Codes")."""
    if len(body) > _MAX_ERROR_BODY:
        return set()
    try:
        errors = json.loads(body)["errors"]
        return {str(error["code"]) for error in errors}
    except (ValueError, LookupError, TypeError, RecursionError):
        return set()


T = TypeVar("T")


class DocumentParser:
    """Parses the documents of one upstream: small ones at once, large ones in a thread, one at a time. A document may
    take ten times its size in memory while it is parsed."""

    def __init__(self) -> None:
        self._turn = asyncio.Semaphore(1)

    async def run(self, size: int, read: Callable[[], T]) -> T:
        """Returns the result of `read`, which parses a document of `size` bytes. When cancelled, the parsing does not
        start, or its result is dropped. The next document waits for the end of the thread."""
        if size <= UNCHECKED_BYTES:
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
            del reading  # breaks a cycle with its error's traceback, which would keep the document in memory

    def _done(self, reading: asyncio.Future[T]) -> None:
        self._turn.release()
        if not reading.cancelled():
            reading.exception()  # marks it as retrieved, so that asyncio logs nothing

    async def verified_manifest(self, answer: UpstreamResponse, reference: Reference) -> Manifest:
        """Returns the manifest if its bytes match the digest in `reference`, or the one the response names. Raises
        UpstreamUnavailable."""
        where = loggable_origin(answer.url)
        try:
            return await self._parse(answer, answer.media_type, _expected_digest(answer, reference))
        except DigestInvalid:
            raise UpstreamUnavailable(f"{where} sends a manifest whose bytes have another digest") from None
        except ManifestInvalid as error:
            raise UpstreamUnavailable(f"{where} sends a manifest that is not valid: {error.message}") from None

    async def descriptors(self, answer: UpstreamResponse) -> tuple[Descriptor, ...]:
        """Returns the descriptors of an index; none if it is another manifest. Raises UpstreamUnavailable."""
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
