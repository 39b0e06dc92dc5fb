"""The errors that a registry raises (`RegistryError` and its subclasses).

There is a subclass for each error code of the OCI distribution spec ("Error Codes"). Other subclasses are for errors
that have no code in the spec. This library does not know HTTP: the table
`registry.http.error_statuses.STATUS_BY_ERROR` maps the classes to HTTP statuses.
"""

from __future__ import annotations

import os
from typing import ClassVar, TypeVar


class RegistryError(Exception):
    """An error that the client gets as the response to its request. `code`: error code, for programs. `message`: text
    for people. `detail`: further facts about the error, as any value that can be written as JSON."""

    code: ClassVar[str] = "UNKNOWN"
    default: ClassVar[str] = "the registry could not do this"
    """The message of an error whose constructor gets no message."""
    redacted: RegistryError | None = None
    """The error that a client gets instead of this error if it may not pull from the repository. It names only digests
    and tags that the client itself has sent. None: all clients get this error."""

    def __init__(self, message: str | None = None, detail: object = None) -> None:
        self.message = message or self.default
        self.detail = detail
        super().__init__(self.message)

    def message_for_operators(self) -> str:
        """Returns the message for operators. Clients must not get it, because it may name files of the server."""
        return self.message


E = TypeVar("E", bound=RegistryError)


def with_redacted(error: E, redacted: RegistryError) -> E:
    """Stores `redacted` in `error` (see `RegistryError.redacted`), and returns `error`."""
    error.redacted = redacted
    return error


class BlobUnknown(RegistryError):
    """The repository does not have the blob."""

    code = "BLOB_UNKNOWN"
    default = "the repository has no such blob"


class BlobUploadInvalid(RegistryError):
    """An upload session cannot be used as requested, for example because a newer request has resumed it."""

    code = "BLOB_UPLOAD_INVALID"
    default = "the blob upload is not valid"


class BlobUploadUnknown(RegistryError):
    """The upload session does not exist, or a different account started it."""

    code = "BLOB_UPLOAD_UNKNOWN"
    default = "there is no such upload session: it was finished, cancelled, or has timed out; start a new one"


class DigestInvalid(RegistryError):
    """A text is not a digest, or content does not have the expected digest."""

    code = "DIGEST_INVALID"
    default = "the digest is not valid, or the content has another digest"


class ManifestBlobUnknown(RegistryError):
    """A manifest refers to blobs or manifests that the repository does not have."""

    code = "MANIFEST_BLOB_UNKNOWN"
    default = "the manifest refers to content this repository does not have; push that content first"


class ManifestInvalid(RegistryError):
    """A manifest is not valid JSON of its type, or exceeds a limit."""

    code = "MANIFEST_INVALID"
    default = "the manifest is not valid"


class TagInvalid(ManifestInvalid):
    """A text is not a tag. This error has the code of ManifestInvalid, because the spec has no code for tags."""

    default = "the tag is not valid"


class PreconditionFailed(ManifestInvalid):
    """The condition `If-Match` or `If-None-Match` of a request does not hold (RFC 9110, section 13.1). This error has
    the code of ManifestInvalid, because the spec has no code for conditions."""

    default = "the tag has changed meanwhile; fetch it again and retry"


class ManifestTooLarge(ManifestInvalid):
    """A manifest has more bytes than the registry accepts."""

    default = "the manifest is larger than this registry accepts"


class ManifestUnknown(RegistryError):
    """The repository does not have the manifest or tag."""

    code = "MANIFEST_UNKNOWN"
    default = "the repository has no such manifest"


class NameInvalid(RegistryError):
    """A text is not the name of a repository."""

    code = "NAME_INVALID"
    default = "the repository name is not valid"


class NameUnknown(RegistryError):
    """The repository does not exist: it never had content."""

    code = "NAME_UNKNOWN"
    default = "there is no such repository"


class NameHidden(NameUnknown):
    """The client may not pull from the repository. The client gets the same response as for a repository that does
    not exist. The audit log records that the client was refused."""


class SizeInvalid(RegistryError):
    """The client sent fewer or more bytes than it had declared."""

    code = "SIZE_INVALID"
    default = "the number of bytes that were sent is not the number that was declared"


class RangeInvalid(RegistryError):
    """A range of bytes is not valid. There are two cases:

    - A client requests a range of a blob, and no byte of the range is in the blob. `size`: the size of the blob in
      bytes, which the response names as `Content-Range: bytes */size`; None if the size is not known. `offset` is None.
    - A chunk of an upload does not start right after the bytes that the upload has. `offset`: the number of these
      bytes. `size` is None.
    """

    code = "BLOB_UPLOAD_INVALID"
    default = "the range lies outside the content"

    def __init__(self, message: str | None = None, *, size: int | None = None, offset: int | None = None) -> None:
        super().__init__(
            message, {name: value for name, value in (("size", size), ("offset", offset)) if value is not None} or None
        )
        self.size = size
        self.offset = offset


class Unauthorized(RegistryError):
    """The client must log in, or log in again. `reason`: what is wrong with the client's token, as an error code of RFC
    6750, section 3.1:

    - `invalid_token`: the token is not valid.
    - `insufficient_scope`: the token does not include the right that the request needs.
    - None: the request had no token.
    """

    code = "UNAUTHORIZED"
    default = "log in first"

    def __init__(self, message: str | None = None, detail: object = None, *, reason: str | None = None) -> None:
        super().__init__(message, detail)
        self.reason = reason


class Denied(RegistryError):
    """The account of the client does not have the right to do this."""

    code = "DENIED"
    default = "you may not do this"


class QuotaExceeded(Denied):
    """A push does not fit into a quota. The push has stored nothing."""

    default = "the quota is used up"


class ImmutableTagDenied(Denied):
    """The request would change an immutable tag, or a manifest that an immutable tag needs. No client has the right to
    do this."""

    default = "an immutable tag cannot be changed"


class Unsupported(RegistryError):
    """The registry does not support the operation."""

    code = "UNSUPPORTED"
    default = "this registry does not do that"


class TooManyRequests(RegistryError):
    """A limit is exceeded. `retry_after`: number of seconds after which the client may try again. There are two cases:

    - The request exceeds a limit of this registry, such as a rate limit or a number of concurrent requests.
    - This registry has exceeded the rate limit of an upstream registry, from which it mirrors the repository.
    """

    code = "TOOMANYREQUESTS"
    default = "too many requests; wait a little"

    def __init__(self, message: str | None = None, detail: object = None, *, retry_after: int = 1) -> None:
        super().__init__(message, detail)
        self.retry_after = retry_after


class UpstreamUnavailable(RegistryError):
    """The upstream registry, from which this registry mirrors the repository, cannot be reached or has failed.
    `retry_after`: number of seconds after which the client may try again; None if the number is not known."""

    code = "UNAVAILABLE"
    default = "the upstream registry does not answer"

    def __init__(self, message: str | None = None, detail: object = None, *, retry_after: int | None = None) -> None:
        super().__init__(message, detail)
        self.retry_after = retry_after


class UpstreamTimeout(UpstreamUnavailable):
    """The upstream registry did not answer in time."""

    default = "the upstream registry does not answer in time"


class PartialBlobLost(RegistryError):
    """A *partial blob* (a blob that is being downloaded from its upstream registry) cannot be read to its end: the
    downloading process has stopped, or the received bytes were deleted. The next download continues after the bytes
    that are still stored."""

    code = "UNAVAILABLE"
    default = "the download of this blob from its upstream registry was interrupted; try again"


class StorageFull(RegistryError):
    """The disk is full, or a quota of the file system is used up. The failed change has stored nothing. For quotas of
    this registry, see `QuotaExceeded`."""

    code = "STORAGE_FULL"
    default = "the registry's disk is full; free some space or ask its operator to"


class StorageFailed(RegistryError):
    """The disk or the database failed. Nothing is wrong with the request."""

    code = "STORAGE_FAILED"
    default = "the registry's storage failed; the server's log says why"

    def message_for_operators(self) -> str:
        """Returns the message and, if an OSError that names a file has caused this error, the file."""
        name = self.__cause__.filename if isinstance(self.__cause__, OSError) else None
        # `filename` is None if the error names no file, and a number if the error names a file descriptor.
        if not isinstance(name, str | bytes) or os.fsdecode(name) in self.message:
            return self.message
        return f"{self.message}: {os.fsdecode(name)}"


class SearchIndexDamaged(StorageFailed):
    """Database tables that the search reads are damaged. `storage.content_search.SearchIndex.rebuild` repairs the
    tables of the search index, but no other tables."""

    default = "the search index is damaged; entrepot fsck --repair builds it again"


class TooManyOpenFiles(StorageFailed):
    """The process or the machine has reached its limit of open files. `retry_after`: number of seconds after which the
    client may try again."""

    code = "UNAVAILABLE"
    default = "the registry has as many files open as it may; try again in a moment"
    retry_after = 1


class DataDirectoryReplaced(StorageFailed):
    """A change was refused because the path of the data directory now leads to a different directory, or to none. Reads
    still work, from the directory that the process has open."""

    code = "UNAVAILABLE"
    default = (
        "the registry's data directory was moved away or replaced while the server was running, so it accepts no "
        "changes; /readyz says what to do"
    )


class BytesForbidden(StorageFailed):
    """The process has no permission to read the stored bytes of a blob or to list the blobs in a directory. It is not
    known whether the bytes are damaged. The message names the file or directory, and says what to do."""


def blob_in_use_error(repo: str, digest: str, manifest: str) -> Unsupported:
    """Returns the error for the case that the blob `digest` cannot be deleted from `repo`, because a manifest refers to
    the blob. `manifest`: the digest of this manifest."""
    advice = "delete these manifests first: garbage collection then deletes the blob"
    return with_redacted(
        Unsupported(
            f"manifests of {repo}, such as {manifest}, refer to the blob {digest}; {advice}",
            {"digest": digest, "manifest": manifest},
        ),
        Unsupported(f"manifests of {repo} refer to the blob {digest}; {advice}", {"digest": digest}),
    )
