"""Converts responses of upstream registries to errors (`error_for_response`), and parses their JSON (`DocumentParser`).

A *not-found error* is a ManifestUnknown, BlobUnknown or NameUnknown. After a not-found error, the mirror deletes or
hides cached content. Each of the three errors has an *unconfirmed* variant, for a response that may come from a proxy
or firewall. After an unconfirmed error, the mirror keeps the content.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

from registry.mirror.upstream_client import (
    Unconfirmed,
    UnconfirmedBlobUnknown,
    UnconfirmedManifestUnknown,
    UnconfirmedNameUnknown,
    UpstreamContentInvalid,
)
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
from storage.json_bounds import QUICK_PARSE_BYTES
from storage.names import Digest, Reference

ACCEPTED_MANIFESTS = ", ".join((OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST))
"""The `Accept` header for manifests: all types except Docker's schema 1. Without the header, a registry may convert a
manifest to an older type, which changes the digest."""

_UNKNOWN_CODES = frozenset({"MANIFEST_UNKNOWN", "BLOB_UNKNOWN", "NAME_UNKNOWN", "NAME_INVALID"})
"""Error codes that mean "not found" (OCI distribution spec, "Error Codes")."""
_REFUSAL_CODES = _UNKNOWN_CODES | {"UNAUTHORIZED", "DENIED", "UNSUPPORTED", "TAG_INVALID", "NOT_FOUND", "FORBIDDEN"}
"""Error codes with which registries refuse requests, from the OCI distribution spec, Docker's registry and Harbor.
Proxies and firewalls do not send these codes."""
_MAX_ERROR_BODY_BYTES = 64 << 10
"""Size of the largest body that is searched for error codes."""


@dataclass(frozen=True, slots=True)
class UpstreamResponse:
    """A response of an upstream, or of a server to which the upstream has redirected the request."""

    status: int
    headers: Mapping[str, str]
    """By name in lower case. Repeated headers are joined with ", "."""
    url: str
    """The URL after redirects."""
    is_cross_origin: bool
    """Whether a redirect led to another origin."""
    body: bytes = b""
    """Empty if the body was not read."""
    network: NetworkClass = NetworkClass.PUBLIC
    """URLs in this response may lead only to addresses of this network class, to public addresses, and to hosts that
    the settings allow. This rule protects private networks against servers outside them. Therefore, if a redirect has
    led to a server of another class than the first server, the value is PUBLIC. Otherwise, the value is the class of
    the first server."""

    @property
    def length(self) -> int | None:
        """`Content-Length` in bytes; None if the header is missing or not valid."""
        return parse_count(self.headers.get("content-length"))

    @property
    def digest(self) -> Digest | None:
        """`Docker-Content-Digest`; None if the header is missing, not valid, or has an unsupported algorithm."""
        try:
            return Digest(self.headers.get("docker-content-digest", "").strip())
        except DigestInvalid:
            return None

    @property
    def media_type(self) -> str | None:
        """The media type in `Content-Type`; None if it is not a media type of manifests or indexes."""
        content_type = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        return content_type if content_type in MANIFESTS | INDEXES else None


def parse_count(text: str | None) -> int | None:
    """Returns the number in a header value; None if the value is not a number of 1 to 18 digits. Numbers of this length
    fit into the database."""
    text = (text or "").strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else None


def error_for_response(
    response: UpstreamResponse, not_found_error: RegistryError, has_login: bool, had_token: bool = False
) -> RegistryError:
    """Returns the error to raise for an unsuccessful response. `not_found_error`: the not-found error for the requested
    content, or its unconfirmed variant. `has_login`: whether a login is configured. `had_token`: whether the request
    had a token of the upstream's token service."""
    status, server = response.status, loggable_origin(response.url)
    if response.is_cross_origin and status in (401, 403):
        # The configured login is not sent to another origin, so this server has not refused it.
        return UpstreamUnavailable(f"the upstream redirects to {server}, which refuses the request ({status})")
    if status in (404, 410):
        return not_found_error if is_from_registry(response) else as_unconfirmed(not_found_error)
    if status == 400 and _error_codes(response.body) & _UNKNOWN_CODES:
        return not_found_error
    if status in (401, 403):
        if has_login:
            return login_denied(server)
        if _is_confirmed_refusal(response, had_token):
            return not_found_error
        return as_unconfirmed(not_found_error, needs_login=status == 401 or is_from_registry(response))
    return UpstreamUnavailable(f"the upstream registry {server} answers {status}")


def _is_confirmed_refusal(response: UpstreamResponse, had_token: bool) -> bool:
    """Returns whether a 401 or 403 shows that the registry has no such content for anonymous clients. Call it only if
    no login is configured: a token in the request was then issued to an anonymous client.

    A *denial code* is a code of _REFUSAL_CODES other than UNAUTHORIZED. If the request had a token, the result depends
    on the challenge:

    - `insufficient_scope`: True. The registry accepted the token and still refused access.
    - `invalid_token`: False. The registry did not accept the token.
    - Any other challenge, or no challenge: True if the body has a denial code.

    If the request had no token, returns True only for a 403 that has a denial code and no challenge."""
    challenge = response.headers.get("www-authenticate", "")
    has_denial_code = bool(_error_codes(response.body) & (_REFUSAL_CODES - {"UNAUTHORIZED"}))
    if had_token:
        return "insufficient_scope" in challenge or ("invalid_token" not in challenge and has_denial_code)
    return response.status == 403 and not challenge and has_denial_code


def is_from_registry(response: UpstreamResponse) -> bool:
    """Returns whether the body has an error code that only registries send (`_REFUSAL_CODES`)."""
    return bool(_error_codes(response.body) & _REFUSAL_CODES)


def as_unconfirmed(not_found_error: RegistryError, *, needs_login: bool = False) -> RegistryError:
    """Returns the unconfirmed variant of a not-found error. Returns any other error unchanged. `needs_login`: the value
    of `Unconfirmed.needs_login`."""
    if isinstance(not_found_error, Unconfirmed):
        return not_found_error
    error: UnconfirmedNameUnknown | UnconfirmedBlobUnknown | UnconfirmedManifestUnknown
    if isinstance(not_found_error, NameUnknown):
        error = UnconfirmedNameUnknown()
    elif isinstance(not_found_error, BlobUnknown):
        error = UnconfirmedBlobUnknown()
    elif isinstance(not_found_error, ManifestUnknown):
        error = UnconfirmedManifestUnknown()
    else:
        return not_found_error
    error.needs_login = needs_login
    return error


def login_denied(server: str) -> Denied:
    """Returns the error for a refused login. `server`: an origin, such as `https://ghcr.io`."""
    return Denied(f"the upstream registry {server} refuses the login configured for it")


def _error_codes(body: bytes) -> set[str]:
    """Returns the error codes in the body of a response (OCI distribution spec, "Error Codes"). Returns an empty set if
    the body is larger than `_MAX_ERROR_BODY_BYTES`, or is not such a document."""
    if len(body) > _MAX_ERROR_BODY_BYTES:
        return set()
    try:
        errors = json.loads(body)["errors"]
        return {str(error["code"]) for error in errors}
    except (ValueError, LookupError, TypeError, RecursionError):
        return set()


T = TypeVar("T")
MAX_INLINE_BYTES: Final = QUICK_PARSE_BYTES
"""Size of the largest document that is parsed on the event loop. Larger documents are parsed in a thread."""


class DocumentParser:
    """Parses the JSON documents of one upstream. Parses documents larger than `MAX_INLINE_BYTES` in a thread, one at a
    time, because parsing may take ten times as much memory as the document."""

    def __init__(self) -> None:
        self._large_document_lock = asyncio.Semaphore(1)

    async def run(self, size_bytes: int, parse: Callable[[], T]) -> T:
        """Calls `parse` and returns its result, or raises its error. `size_bytes`: size of the document that `parse`
        parses. After a cancellation, the thread continues, and the next large document waits for it."""
        if size_bytes <= MAX_INLINE_BYTES:
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
            # Breaks a reference cycle: `parsing` refers to the error, whose traceback refers to this frame. The cycle
            # would keep the document in memory until the garbage collector runs.
            del parsing

    def _on_parsed(self, parsing: asyncio.Future[T]) -> None:
        self._large_document_lock.release()
        if not parsing.cancelled():
            parsing.exception()  # marks the exception as retrieved, so that asyncio does not log it

    async def parse_verified_manifest(self, response: UpstreamResponse, reference: Reference) -> Manifest:
        """Returns the manifest in a response. Raises UpstreamContentInvalid if the manifest is not valid. Raises
        UpstreamUnavailable if the manifest does not have the expected digest (`_expected_digest`)."""
        server = loggable_origin(response.url)
        try:
            return await self._parse(response, response.media_type, _expected_digest(response, reference))
        except DigestInvalid:
            raise UpstreamUnavailable(f"{server} sends a manifest that does not have the expected digest") from None
        except ManifestInvalid as error:
            raise UpstreamContentInvalid(f"{server} sends a manifest that is not valid: {error.message}") from None

    async def parse_descriptors(self, response: UpstreamResponse) -> tuple[Descriptor, ...]:
        """Returns the descriptors in the index that a response contains; an empty tuple if the response contains a
        manifest that is no index. If `response.media_type` is None, parses the body as an index. Raises
        UpstreamUnavailable if the body is not valid."""
        try:
            index = await self._parse(response, response.media_type or OCI_INDEX, None)
        except ManifestInvalid as error:
            server = loggable_origin(response.url)
            raise UpstreamUnavailable(f"{server} sends an index that is not valid: {error.message}") from None
        return tuple(index.manifests) if index.media_type in INDEXES else ()

    async def _parse(self, response: UpstreamResponse, media_type: str | None, digest: Digest | None) -> Manifest:
        return await self.run(len(response.body), lambda: Manifest.parse(response.body, media_type, digest))


def _expected_digest(response: UpstreamResponse, reference: Reference) -> Digest | None:
    """Returns the digest that the manifest in a response must have; None if every digest is accepted."""
    return reference if isinstance(reference, Digest) else response.digest
