"""The HTTP form of each error: its status (`STATUS_BY_ERROR`), and its JSON body in the format of the OCI spec.

This module also defines the errors that only HTTP requests cause, such as an unknown path. The other errors are in
`storage.errors`, `storage.access`, `storage.backups`, `storage.imports`, `storage.jobs`, `storage.upstream_tags` and
`registry.request`.

Sources: OCI distribution spec, "Error Codes"; RFC 9110, 15.5 and 15.6; RFC 6585 for 429.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Final

from registry.request import RequestInvalid
from storage import access, backups, errors, imports, jobs, upstream_tags
from storage.errors import RegistryError


class BodyTooSlow(RequestInvalid):
    """The client sends the request's body more slowly than the minimum rate (`registry.http.body_memory`)."""

    default = "the body comes too slowly"


class FormTooLarge(RequestInvalid):
    """A form that a client sends to `/token` or `/login` is too large."""

    default = "the form is too large"


class FormInvalid(RequestInvalid):
    """A form that a client sends to `/token` or `/login` is not valid. `oauth_code`: the error code of OAuth 2.0 (RFC
    6749, 5.2) in the response of `/token`."""

    default = "the form is not valid"

    def __init__(
        self, message: str | None = None, detail: object = None, *, oauth_code: str = "invalid_request"
    ) -> None:
        super().__init__(message, detail)
        self.oauth_code = oauth_code


class PathUnknown(RegistryError):
    """The path names no resource of the distribution API."""

    code = "UNSUPPORTED"
    default = "there is nothing at this path"


class MethodUnknown(RegistryError):
    """The resource does not support the method of the request."""

    code = "UNSUPPORTED"
    default = "this resource does not support the method"


class TooManyTags(errors.ManifestInvalid):
    """A manifest PUT names more tags in its query than `RequestLimits.tags_per_put`."""

    default = "the request sets more tags than this registry accepts in one request"


STATUS_BY_ERROR: Final[Mapping[type[RegistryError], int]] = {
    RegistryError: 500,
    errors.BlobUnknown: 404,
    errors.BlobUploadInvalid: 400,
    errors.BlobUploadUnknown: 404,
    errors.DigestInvalid: 400,
    errors.ManifestBlobUnknown: 404,
    errors.ManifestInvalid: 400,
    errors.TagInvalid: 400,
    errors.PreconditionFailed: 412,
    errors.ManifestTooLarge: 413,
    errors.ManifestUnknown: 404,
    errors.NameInvalid: 400,
    errors.NameUnknown: 404,
    errors.NameHidden: 404,  # the client may not pull from the repository, and must not learn whether it exists
    errors.SizeInvalid: 400,
    errors.RangeInvalid: 416,
    errors.Unauthorized: 401,
    errors.Denied: 403,
    errors.QuotaExceeded: 403,
    errors.ImmutableTagDenied: 403,
    errors.Unsupported: 405,
    errors.TooManyRequests: 429,
    errors.UpstreamUnavailable: 502,
    errors.UpstreamTimeout: 504,
    errors.PartialBlobLost: 502,  # the download of a blob from an upstream was interrupted
    access.AccountInvalid: 400,
    access.AccountUnknown: 404,
    access.AccountHidden: 404,
    access.AccountExists: 409,
    access.LastAdmin: 409,
    jobs.JobUnknown: 404,
    jobs.JobRunning: 409,
    jobs.JobStopped: 409,
    upstream_tags.TagNotFrozen: 404,
    upstream_tags.TagFrozen: 403,
    backups.BackupFailed: 500,
    backups.BackupTargetUnknown: 409,
    backups.ImageFileFailed: 500,
    imports.ImportInvalid: 400,
    imports.ContentBroken: 502,
    imports.OldRegistryDown: 502,
    errors.StorageFull: 507,
    errors.StorageFailed: 500,
    errors.SearchIndexDamaged: 500,
    errors.TooManyOpenFiles: 503,
    errors.DataDirectoryReplaced: 503,
    errors.BytesForbidden: 500,  # this process, not the client, has no permission to read stored bytes
    RequestInvalid: 400,
    FormInvalid: 400,
    FormTooLarge: 413,
    BodyTooSlow: 408,
    PathUnknown: 404,
    MethodUnknown: 405,
    TooManyTags: 414,
}
"""The HTTP status of each error class. A test checks that each class whose errors can reach a client has
an entry."""


def status_of(error: RegistryError) -> int:
    """Returns the HTTP status of an error. If the error's class has no entry in `STATUS_BY_ERROR`, returns the status
    of the nearest base class that has an entry."""
    return next(STATUS_BY_ERROR[kind] for kind in type(error).__mro__ if kind in STATUS_BY_ERROR)


def error_json(code: str, message: str, detail: object = None) -> bytes:
    """Returns the JSON body that reports one error, in the form of the OCI spec. `detail`: any JSON value; None:
    the body has no detail."""
    error: dict[str, object] = {"code": code, "message": message}
    if detail is not None:
        error["detail"] = detail
    return json.dumps({"errors": [error]}, separators=(",", ":"), default=str).encode("ascii") + b"\n"
