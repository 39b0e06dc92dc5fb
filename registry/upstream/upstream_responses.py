"""Responses of upstream registries: the errors they map to (`error_for_response`), and the parsing of their JSON
(`DocumentParser`).

"Unknown" stands for the errors ManifestUnknown, BlobUnknown and NameUnknown ("not found"). Each has an *unconfirmed*
variant for a response that may not come from the registry itself, but from a proxy or firewall in front of it. Because
of a confirmed "unknown" the mirror deletes or hides cached content; an unconfirmed one changes nothing.
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
from storage.json_bounds import UNCHECKED_BYTES
from storage.names import Digest, Reference

ACCEPTED_MANIFESTS = ", ".join((OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST))
"""The `Accept` header for manifests: all types but schema 1. Without it, registries convert manifests to an older type,
which changes the digest."""

_UNKNOWN_CODES = frozenset({"MANIFEST_UNKNOWN", "BLOB_UNKNOWN", "NAME_UNKNOWN", "NAME_INVALID"})
"""Error codes that mean "not found" (OCI distribution spec, "Error Codes")."""
_REFUSAL_CODES = _UNKNOWN_CODES | {"UNAUTHORIZED", "DENIED", "UNSUPPORTED", "TAG_INVALID", "NOT_FOUND", "FORBIDDEN"}
"""Error codes of refusals: codes of the OCI distribution spec, and codes that Docker's registry and Harbor add. A
response with such a code comes from a registry."""
_MAX_ERROR_BODY = 64 << 10
"""Largest body, in bytes, that is searched for error codes. A larger body is not an error document of a registry."""


@dataclass(frozen=True, slots=True)
class UpstreamResponse:
    """A response of an upstream, or of a server it redirected to. Header names are in lower case; the values of
    repeated fields are joined with ", "."""

    status: int
    headers: Mapping[str, str]
    url: str
    """The URL of the request that got this response, after redirects."""
    is_cross_origin: bool
    """Whether a redirect led to another origin, so that the response is not the upstream's own."""
    body: bytes = b""
    network: NetworkClass = NetworkClass.PUBLIC
    """The network class of the server. The URL of a redirect, a next page or a token service in this response may lead
    to addresses of this class, and to public addresses."""

    @property
    def length(self) -> int | None:
        """`Content-Length` in bytes; None if it is missing or not valid."""
        return parse_count(self.headers.get("content-length"))

    @property
    def digest(self) -> Digest | None:
        """`Docker-Content-Digest`; None if it is missing, not valid, or of an unknown algorithm."""
        try:
            return Digest(self.headers.get("docker-content-digest", "").strip())
        except DigestInvalid:
            return None

    @property
    def media_type(self) -> str | None:
        """`Content-Type` if it is that of a manifest or an index; otherwise None."""
        kind = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        return kind if kind in MANIFESTS | INDEXES else None


def parse_count(text: str | None) -> int | None:
    """Returns the non-negative integer that a header's value spells; None for any other text."""
    text = (text or "").strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


def error_for_response(
    response: UpstreamResponse, not_found_error: RegistryError, has_login: bool, sent_token: bool = False
) -> RegistryError:
    """Returns the error to raise for an unsuccessful response. `not_found_error` is the "unknown" error of the
    requested content. `has_login`: whether a login is configured, so that a refusal is a refusal of that login.
    `sent_token`: whether the request carried a token that the registry's token service had issued for it."""
    status, server = response.status, loggable_origin(response.url)
    if response.is_cross_origin and status in (401, 403):
        # The URL of a redirect contains its own authorisation, so this refusal is not about the configured login.
        return UpstreamUnavailable(f"the upstream sent us on to {server}, which refuses us ({status})")
    if status in (404, 410):
        return not_found_error if is_from_registry(response) else as_unconfirmed(not_found_error)
    if status == 400 and _error_codes(response.body) & _UNKNOWN_CODES:
        return not_found_error
    if status in (401, 403):
        if has_login:
            return login_denied(server)
        return not_found_error if _is_confirmed_refusal(response, sent_token) else as_unconfirmed(not_found_error)
    return UpstreamUnavailable(f"the upstream registry {server} answers {status}")


def _is_confirmed_refusal(response: UpstreamResponse, sent_token: bool) -> bool:
    """Returns whether a refused request without a login shows that the registry has no such content for anonymous
    clients. That is so if the registry accepts the token but finds its rights insufficient, or if it answers 403
    without a challenge. If no token was obtained, or the token was not accepted, the refusal says nothing about the
    content."""
    challenge = response.headers.get("www-authenticate", "")
    has_refusal_code = bool(_error_codes(response.body) & (_REFUSAL_CODES - {"UNAUTHORIZED"}))
    if sent_token:
        return "insufficient_scope" in challenge or ("invalid_token" not in challenge and has_refusal_code)
    return response.status == 403 and not challenge and has_refusal_code


def is_from_registry(response: UpstreamResponse) -> bool:
    """Returns whether the body has an error code of a registry, so that the refusal does not come from a proxy or
    firewall. False for a response to HEAD, which has no body."""
    return bool(_error_codes(response.body) & _REFUSAL_CODES)


def as_unconfirmed(not_found_error: RegistryError) -> RegistryError:
    """Returns the unconfirmed variant of an "unknown" error; any other error unchanged."""
    if isinstance(not_found_error, NameUnknown):
        return UnconfirmedNameUnknown()
    if isinstance(not_found_error, BlobUnknown):
        return UnconfirmedBlobUnknown()
    return UnconfirmedManifestUnknown() if isinstance(not_found_error, ManifestUnknown) else not_found_error


def login_denied(server: str) -> Denied:
    """Returns the error to raise when `server` (an origin) refuses the configured login."""
    return Denied(f"the upstream registry {server} refuses the login configured for it")


def _error_codes(body: bytes) -> set[str]:
    """Returns the error codes in a body (OCI distribution spec, "Error Codes"); an empty set if it has none."""
    if len(body) > _MAX_ERROR_BODY:
        return set()
    try:
        errors = json.loads(body)["errors"]
        return {str(error["code"]) for error in errors}
    except (ValueError, LookupError, TypeError, RecursionError):
        return set()


T = TypeVar("T")


class DocumentParser:
    """Parses the JSON documents of one upstream. Small documents are parsed on the event loop. Large ones are parsed in
    a thread and one at a time, because parsing a document may take ten times its size in memory."""

    def __init__(self) -> None:
        self._large_document_lock = asyncio.Semaphore(1)

    async def run(self, size_bytes: int, parse: Callable[[], T]) -> T:
        """Returns the result of `parse`, which parses a document of `size_bytes`, and raises what it raises. After a
        cancellation the parsing does not start, or it ends in its thread and its result is lost; the next large
        document waits for that end."""
        if size_bytes <= UNCHECKED_BYTES:
            return parse()
        await self._large_document_lock.acquire()
        try:
            parsing = asyncio.get_running_loop().run_in_executor(None, parse)
        except BaseException:
            self._large_document_lock.release()
            raise
        parsing.add_done_callback(self._on_parsed)
        try:
            return await asyncio.shield(parsing)
        finally:
            del parsing  # its error's traceback refers to this frame; the cycle would keep the document in memory

    def _on_parsed(self, parsing: asyncio.Future[T]) -> None:
        self._large_document_lock.release()
        if not parsing.cancelled():
            parsing.exception()  # marks it as retrieved, so that asyncio logs nothing

    async def verified_manifest(self, response: UpstreamResponse, reference: Reference) -> Manifest:
        """Returns the manifest in a response. Raises UpstreamUnavailable if it is not valid, or if its bytes do not
        match the digest: `reference`, or for a tag the digest that the response names, if any."""
        server = loggable_origin(response.url)
        try:
            return await self._parse_manifest(response, response.media_type, _expected_digest(response, reference))
        except DigestInvalid:
            raise UpstreamUnavailable(f"{server} sends a manifest whose bytes have another digest") from None
        except ManifestInvalid as error:
            raise UpstreamUnavailable(f"{server} sends a manifest that is not valid: {error.message}") from None

    async def descriptors(self, response: UpstreamResponse) -> tuple[Descriptor, ...]:
        """Returns the descriptors of the index in a response; an empty tuple if it is a manifest of another type.
        Raises UpstreamUnavailable if it is not valid."""
        try:
            index = await self._parse_manifest(response, response.media_type or OCI_INDEX, None)
        except ManifestInvalid as error:
            server = loggable_origin(response.url)
            raise UpstreamUnavailable(f"{server} sends an index that is not valid: {error.message}") from None
        return tuple(index.manifests) if index.media_type in INDEXES else ()

    async def _parse_manifest(
        self, response: UpstreamResponse, media_type: str | None, digest: Digest | None
    ) -> Manifest:
        return await self.run(len(response.body), lambda: Manifest.parse(response.body, media_type, digest))


def _expected_digest(response: UpstreamResponse, reference: Reference) -> Digest | None:
    """Returns the digest that the manifest must have; None if it is not known."""
    return reference if isinstance(reference, Digest) else response.digest
