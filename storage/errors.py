"""Errors that a registry raises (`RegistryError`).

There is a subclass for each error code of the OCI distribution spec ("Error Codes"), and some for which the spec has no
code. The library knows codes, not HTTP statuses: `registry.http.error_statuses.STATUS` gives each class its status.
"""

from __future__ import annotations

from typing import ClassVar


class RegistryError(Exception):
    """An error for clients: `code` for programs, `message` for people, `detail` (any JSON) for both."""

    code: ClassVar[str] = "UNKNOWN"
    default: ClassVar[str] = "the registry could not do this"

    def __init__(self, message: str | None = None, detail: object = None) -> None:
        self.message = message or self.default
        self.detail = detail
        super().__init__(self.message)


class BlobUnknown(RegistryError):
    code = "BLOB_UNKNOWN"
    default = "the repository has no such blob"


class BlobUploadInvalid(RegistryError):
    code = "BLOB_UPLOAD_INVALID"
    default = "the blob upload is not valid"


class BlobUploadUnknown(RegistryError):
    code = "BLOB_UPLOAD_UNKNOWN"
    default = "there is no such upload session: it was finished, cancelled, or has timed out; start a new one"


class DigestInvalid(RegistryError):
    code = "DIGEST_INVALID"
    default = "the digest is not valid, or the content has another one"


class ManifestBlobUnknown(RegistryError):
    code = "MANIFEST_BLOB_UNKNOWN"
    default = "the manifest refers to content this repository does not have; push that first"


class ManifestInvalid(RegistryError):
    code = "MANIFEST_INVALID"
    default = "the manifest is not valid"


class TagInvalid(ManifestInvalid):
    """A tag does not match the grammar. The spec has no code for this, so it is a kind of invalid manifest."""

    default = "the tag is not valid"


class PreconditionFailed(ManifestInvalid):
    """`If-Match` or `If-None-Match` on a manifest PUT does not hold (RFC 9110, section 13.1)."""

    default = "the tag has changed meanwhile; fetch it again and retry"


class ManifestTooLarge(ManifestInvalid):
    default = "the manifest is larger than this registry accepts"


class ManifestUnknown(RegistryError):
    code = "MANIFEST_UNKNOWN"
    default = "the repository has no such manifest"


class NameInvalid(RegistryError):
    code = "NAME_INVALID"
    default = "the repository name is not valid"


class NameUnknown(RegistryError):
    code = "NAME_UNKNOWN"
    default = "there is no such repository"


class SizeInvalid(RegistryError):
    code = "SIZE_INVALID"
    default = "the length sent is not the length declared"


class RangeInvalid(RegistryError):
    """A span lies outside the content, or a chunk does not start at the upload's offset.

    `size`: length of the content in bytes, if known (for `Content-Range: bytes */size`). `offset`: the upload's offset.
    """

    code = "BLOB_UPLOAD_INVALID"
    default = "the range lies outside the content"

    def __init__(self, message: str | None = None, *, size: int | None = None, offset: int | None = None) -> None:
        super().__init__(message, {k: v for k, v in (("size", size), ("offset", offset)) if v is not None} or None)
        self.size = size
        self.offset = offset


class Unauthorized(RegistryError):
    """The client is unknown or has too few rights. `reason`: why a token was not enough, `invalid_token` or
    `insufficient_scope` (RFC 6750, 3.1)."""

    code = "UNAUTHORIZED"
    default = "log in first"

    def __init__(self, message: str | None = None, detail: object = None, *, reason: str | None = None) -> None:
        super().__init__(message, detail)
        self.reason = reason


class Denied(RegistryError):
    code = "DENIED"
    default = "you may not do this"


class Unsupported(RegistryError):
    code = "UNSUPPORTED"
    default = "this registry does not do that"


class TooManyRequests(RegistryError):
    """The client or the upstream is rate limited. `retry_after`: seconds."""

    code = "TOOMANYREQUESTS"
    default = "too many requests; wait a little"

    def __init__(self, message: str | None = None, detail: object = None, *, retry_after: int = 1) -> None:
        super().__init__(message, detail)
        self.retry_after = retry_after


class UpstreamUnavailable(RegistryError):
    """No upstream answers. `retry_after`: seconds after which a retry makes sense; None: unknown."""

    code = "UNAVAILABLE"
    default = "the upstream registry does not answer"

    def __init__(self, message: str | None = None, detail: object = None, *, retry_after: int | None = None) -> None:
        super().__init__(message, detail)
        self.retry_after = retry_after


class UpstreamTimeout(UpstreamUnavailable):
    default = "the upstream registry does not answer in time"


class PartialLost(RegistryError):
    """A partial blob has no owner any more. Its bytes are kept for the next owner."""

    code = "UNAVAILABLE"
    default = "the blob's way in was broken off; try again"


class StorageFull(RegistryError):
    """The disk, or a quota on it, is full. Nothing of the refused write is kept."""

    code = "STORAGE_FULL"
    default = "the registry's disk is full; free some space or ask its operator to"


class StorageFailed(RegistryError):
    """The disk or the database failed, through no fault of the request."""

    code = "STORAGE_FAILED"
    default = "the registry's storage failed; its log says how"


class TooManyOpenFiles(StorageFailed):
    """The process or the machine has too many files open. `retry_after`: seconds."""

    code = "UNAVAILABLE"
    default = "the registry has as many files open as it may; try again in a moment"
    retry_after = 1


def blob_in_use(repo: str, digest: str, manifest: str) -> Unsupported:
    """Returns the error for a DELETE of a blob that `manifest` refers to."""
    return Unsupported(
        f"manifests of {repo} refer to the blob {digest}; delete those first, such as {manifest}: "
        "blobs that nothing refers to any more are then collected",
        {"digest": digest, "manifest": manifest},
    )
