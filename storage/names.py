"""Repository names, tags, digests and upload ids. Each is a subclass of `str` whose constructor checks the text. So
every instance is valid, and is safe as part of a file path.

Grammar: OCI distribution spec, "Pulling manifests"; OCI image spec, "Digests"; RFC 9562 for upload ids.
"""

from __future__ import annotations

import re
import uuid
from typing import NamedTuple, Self

from storage.errors import BlobUploadUnknown, DigestInvalid, NameInvalid, TagInvalid

DEFAULT_TAG = "latest"
"""The tag to use for a reference that states neither a tag nor a digest."""
MAX_NAME_LENGTH = 255
"""Longest valid repository name, in characters. Many clients allow at most 255 characters for the host, a slash and the
name together (OCI distribution spec, "Pulling manifests")."""

_NAME = re.compile(r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*)*")
_TAG = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")
_UPLOAD_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")

ALGORITHMS = ("sha256", "sha512")
"""The supported digest algorithms."""


def shown(text: str, max_chars: int = 80) -> str:
    """Returns `text` for an error message: in quotes, with escapes, and cut after `max_chars` characters."""
    return repr(text if len(text) <= max_chars else text[:max_chars] + "…")


class RepositoryName(str):
    """Name of a repository. The constructor raises NameInvalid."""

    __slots__ = ()

    def __new__(cls, text: str) -> Self:
        if len(text) > MAX_NAME_LENGTH:
            raise NameInvalid(f"the repository name has {len(text)} characters; at most {MAX_NAME_LENGTH} are allowed")
        if not _NAME.fullmatch(text):
            raise NameInvalid(
                f"{shown(text)} is not a repository name; a name has lower-case letters and digits, and between them "
                "'.', '_', '__', '-' or '/'"
            )
        return super().__new__(cls, text)


class Tag(str):
    """A tag. The constructor raises TagInvalid."""

    __slots__ = ()

    def __new__(cls, text: str) -> Self:
        if not _TAG.fullmatch(text):
            raise TagInvalid(
                f"{shown(text)} is not a tag; a tag has up to 128 letters, digits, '_', '.' and '-', and does not "
                "start with '.' or '-'"
            )
        return super().__new__(cls, text)


class Digest(str):
    """A digest of content, in the form `algorithm:hex`. The constructor raises DigestInvalid if the text has another
    form or the algorithm is not supported."""

    __slots__ = ()

    def __new__(cls, text: str) -> Self:
        if not _DIGEST.fullmatch(text):
            raise DigestInvalid(
                f"{shown(text)} is not a digest; a digest is sha256 or sha512, ':', and the hash in lower-case hex"
            )
        return super().__new__(cls, text)

    @property
    def algorithm(self) -> str:
        """The name of the algorithm, such as `sha256`."""
        return self.partition(":")[0]

    @property
    def encoded(self) -> str:
        """The hash in hex, without the name of the algorithm."""
        return self.partition(":")[2]


Reference = Tag | Digest
"""The tag or digest of a manifest in a repository. An `ImageReference` also names the repository."""


class UploadID(str):
    """Id of an upload session: a UUID in lower case. The constructor raises BlobUploadUnknown for any other text,
    because no session can have that text as its id."""

    __slots__ = ()

    def __new__(cls, text: str) -> Self:
        if not _UPLOAD_ID.fullmatch(text):
            raise BlobUploadUnknown(f"{shown(text)} is not the id of an upload session")
        return super().__new__(cls, text)

    @classmethod
    def random(cls) -> Self:
        """Returns a new random id."""
        return cls(str(uuid.uuid4()))


class ImageReference(NamedTuple):
    """A repository, and a tag or digest in it. In text form: `team/app:1` or `team/app@sha256:…`."""

    repository: RepositoryName
    reference: Reference

    def __str__(self) -> str:
        separator = "@" if isinstance(self.reference, Digest) else ":"
        return f"{self.repository}{separator}{self.reference}"


def as_algorithm(text: str) -> str:
    """Returns `text` if it is the name of a supported digest algorithm. Otherwise raises DigestInvalid."""
    if text not in ALGORITHMS:
        raise DigestInvalid(f"{shown(text)} is not a supported digest algorithm; use {' or '.join(ALGORITHMS)}")
    return text


def as_reference(text: str) -> Reference:
    """Parses `text` as a digest if it contains a ':', otherwise as a tag. Raises TagInvalid, DigestInvalid."""
    return Digest(text) if ":" in text else Tag(text)


def parse_reference(text: str) -> ImageReference:
    """Parses an image reference in the form that people type: `ubuntu`, `team/app:1`, `team/app@sha256:…`. If `text`
    has neither a tag nor a digest, the result has the tag `latest`. If `text` has both, as in `app:1@sha256:…`, the
    result has the digest. The tag must be valid even then. Raises NameInvalid, TagInvalid, DigestInvalid."""
    before_digest, at, digest = text.partition("@")
    repository, colon, tag = before_digest.rpartition(":")
    if not colon or "/" in tag:  # no tag: a colon before a slash separates a host from a port
        repository, tag = before_digest, ""
    elif not tag:
        raise TagInvalid(f"{shown(text)} ends without a tag")
    name = RepositoryName(repository)
    checked_tag = Tag(tag or DEFAULT_TAG)
    return ImageReference(name, Digest(digest) if at else checked_tag)
