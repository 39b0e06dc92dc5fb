"""What a far registry answered, and which of our errors that is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from registry.mirror.source import BlobDoubtful, ManifestDoubtful, NameDoubtful
from registry.upstream.addresses import place
from registry.upstream.networks import Network
from storage.content import DOCKER_LIST, DOCKER_MANIFEST, INDEXES, MANIFESTS, OCI_INDEX, OCI_MANIFEST
from storage.errors import (
    BlobUnknown,
    Denied,
    DigestInvalid,
    ManifestUnknown,
    NameUnknown,
    RegistryError,
    UpstreamUnavailable,
)
from storage.names import Digest

ACCEPT = ", ".join((OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST))
"""Every manifest type but schema 1. Without it registries convert, and the digest is another."""

_UNKNOWN_CODES = frozenset({"MANIFEST_UNKNOWN", "BLOB_UNKNOWN", "NAME_UNKNOWN", "NAME_INVALID"})
_CODES = _UNKNOWN_CODES | {"UNAUTHORIZED", "DENIED", "UNSUPPORTED", "TAG_INVALID", "NOT_FOUND", "FORBIDDEN"}
"""Codes of refusals: the OCI distribution spec's ("Error Codes"), and those that Docker's registry and Harbor add."""
_CODES_SIZE = 64 << 10
"""Bytes of an answer that may hold codes; what is larger is some page."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A response. Header names are in lower case; fields sent more than once are joined with ", "."""

    status: int
    headers: Mapping[str, str]
    url: str
    """Which address answered, after redirects."""
    foreign: bool
    """Another origin than the one asked answered."""
    body: bytes = b""
    network: Network = Network.PUBLIC
    """Where a redirect, a next page or a token service named by this answer may be, beside public addresses."""

    @property
    def length(self) -> int | None:
        return as_count(self.headers.get("content-length"))

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


def as_count(text: str | None) -> int | None:
    """A count of bytes, as headers write it; None for anything else."""
    text = (text or "").strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


def refusal(answer: Answer, unknown: RegistryError, login: bool, granted: bool = False) -> RegistryError:
    """The error for an answer that is no success. `unknown`: what "there is no such thing" means here. `login`: we
    are not anonymous there, so a refusal is one of the login configured. `granted`: the request carried a token that
    the registry's token service gave for it."""
    status, where = answer.status, place(answer.url)
    if answer.foreign and status in (401, 403):
        # A redirect's address carries its own authorisation, so this says nothing about who we are.
        return UpstreamUnavailable(f"the upstream sent us on to {where}, which refuses us ({status})")
    if status in (404, 410):
        return unknown if from_registry(answer) else doubted(unknown)
    if status == 400 and _codes(answer.body) & _UNKNOWN_CODES:
        return unknown
    if status in (401, 403):
        if login:
            return denied(where)
        return unknown if _is_final(answer, granted) else doubted(unknown)
    return UpstreamUnavailable(f"the upstream registry {where} answers {status}")


def _is_final(answer: Answer, granted: bool) -> bool:
    """Whether a refusal of somebody anonymous says that there is no such thing for the anonymous: the registry has
    taken our token and finds that it is not enough, or it forbids without asking for a login. A refusal of the login
    itself (no token was got, the token is not accepted, or just UNAUTHORIZED) says nothing of the thing asked for."""
    challenge = answer.headers.get("www-authenticate", "")
    about_it = bool(_codes(answer.body) & (_CODES - {"UNAUTHORIZED"}))
    if granted:
        return "insufficient_scope" in challenge or ("invalid_token" not in challenge and about_it)
    return answer.status == 403 and not challenge and about_it


def from_registry(answer: Answer) -> bool:
    """Its body shows that a registry refuses, and not something before it. An answer to HEAD shows nothing."""
    return bool(_codes(answer.body) & _CODES)


def doubted(unknown: RegistryError) -> RegistryError:
    """The same where it is not sure that the registry said so. What is here is dropped, or not listed, and "unknown"
    is remembered, only when the upstream has it no more."""
    if isinstance(unknown, NameUnknown):
        return NameDoubtful()
    if isinstance(unknown, BlobUnknown):
        return BlobDoubtful()
    return ManifestDoubtful() if isinstance(unknown, ManifestUnknown) else unknown


def denied(where: str) -> Denied:
    return Denied(f"the upstream registry {where} refuses the login configured for it")


def _codes(body: bytes) -> set[str]:
    """The error codes in a body (OCI distribution spec, "Error Codes")."""
    if len(body) > _CODES_SIZE:
        return set()
    try:
        errors = json.loads(body)["errors"]
        return {str(error["code"]) for error in errors}
    except (ValueError, LookupError, TypeError, RecursionError):
        return set()
