"""Validated names: each class checks the text when it is made, so that every instance is valid and path-safe.

Grammar: OCI distribution spec, "Pulling manifests"; OCI image spec, "Digests"; RFC 9562 for upload ids.
"""

from __future__ import annotations

import re
import uuid
from typing import NamedTuple, Self

from storage.errors import BlobUploadUnknown, DigestInvalid, NameInvalid, TagInvalid

DEFAULT_TAG = "latest"
NAME_LENGTH = 255
"""Longest repository name, in characters. Many clients limit host + '/' + name to it."""

_NAME = re.compile(r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*)*")
_TAG = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")
_UPLOAD = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")

ALGORITHMS = ("sha256", "sha512")


def shown(text: str, most: int = 80) -> str:
    """Returns `text` for a message: quoted, escaped, cut after `most` characters."""
    return repr(text if len(text) <= most else text[:most] + "…")


class RepositoryName(str):
    """Name of a repository. The constructor raises NameInvalid."""

    __slots__ = ()

    def __new__(cls, text: str) -> Self:
        if len(text) > NAME_LENGTH:
            raise NameInvalid(f"the repository name has {len(text)} characters; at most {NAME_LENGTH} are allowed")
        if not _NAME.fullmatch(text):
            raise NameInvalid(
                f"{shown(text)} is not a repository name: lower-case letters and digits, parted by '.', '_', '__', "
                "'-' or '/'"
            )
        return super().__new__(cls, text)


class Tag(str):
    """Tag. The constructor raises TagInvalid."""

    __slots__ = ()

    def __new__(cls, text: str) -> Self:
        if not _TAG.fullmatch(text):
            raise TagInvalid(
                f"{shown(text)} is not a tag: up to 128 letters, digits, '_', '.' and '-', not starting with '.' or '-'"
            )
        return super().__new__(cls, text)


class Digest(str):
    """Content digest, `algorithm:hex`. The constructor raises DigestInvalid, also for an algorithm not supported."""

    __slots__ = ()

    def __new__(cls, text: str) -> Self:
        if not _DIGEST.fullmatch(text):
            raise DigestInvalid(f"{shown(text)} is not a digest: sha256 or sha512, ':', and the hash in lower-case hex")
        return super().__new__(cls, text)

    @property
    def algorithm(self) -> str:
        return self.partition(":")[0]

    @property
    def encoded(self) -> str:
        """Hash in hex."""
        return self.partition(":")[2]


Reference = Tag | Digest


class UploadID(str):
    """Id of an upload session, a UUID. The constructor raises BlobUploadUnknown: a text that is no id names no
    session."""

    __slots__ = ()

    def __new__(cls, text: str) -> Self:
        if not _UPLOAD.fullmatch(text):
            raise BlobUploadUnknown(f"{shown(text)} is not the id of an upload session")
        return super().__new__(cls, text)

    @classmethod
    def random(cls) -> Self:
        return cls(str(uuid.uuid4()))


class ImageReference(NamedTuple):
    """A repository and a reference in it."""

    repository: RepositoryName
    reference: Reference

    def __str__(self) -> str:
        mark = "@" if isinstance(self.reference, Digest) else ":"
        return f"{self.repository}{mark}{self.reference}"


def as_algorithm(text: str) -> str:
    """Returns `text` if it names a supported digest algorithm. Raises DigestInvalid."""
    if text not in ALGORITHMS:
        raise DigestInvalid(f"{shown(text)} is not a digest algorithm supported here: {', '.join(ALGORITHMS)}")
    return text


def as_reference(text: str) -> Reference:
    """Returns a tag or a digest; a text with a ':' is a digest. Raises TagInvalid, DigestInvalid."""
    return Digest(text) if ":" in text else Tag(text)


def parse_reference(text: str) -> ImageReference:
    """Parses what people type: `ubuntu`, `team/app:1`, `team/app@sha256:…`. No tag means `latest`; `app:1@sha256:…`
    means the digest, as docker reads it. Raises NameInvalid, TagInvalid, DigestInvalid."""
    rest, at, digest = text.partition("@")
    head, colon, tag = rest.rpartition(":")
    if not colon or "/" in tag:
        head, tag = rest, ""
        if colon and rest.endswith(":"):
            raise TagInvalid(f"{shown(text)} ends without a tag")
    elif not tag:
        raise TagInvalid(f"{shown(text)} ends without a tag")
    name = RepositoryName(head)
    checked = Tag(tag or DEFAULT_TAG)
    return ImageReference(name, Digest(digest) if at else checked)
