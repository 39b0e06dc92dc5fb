"""Errors in HTTP: the one table from error class to status, and the body in the OCI spec's shape.

Sources: OCI distribution spec, "Error Codes"; RFC 9110, 15.5 and 15.6; RFC 6585 for 429 and 431.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Final

from registry.request import RequestInvalid
from storage import access, errors
from storage.errors import RegistryError


class BodyTooSlow(RequestInvalid):
    default = "the body comes too slowly"


class FormTooLarge(RequestInvalid):
    default = "the form is too large"


class FormInvalid(RequestInvalid):
    """An invalid form of the token service. `oauth`: its error code in RFC 6749, 5.2."""

    default = "the form is not valid"

    def __init__(self, message: str | None = None, detail: object = None, *, oauth: str = "invalid_request") -> None:
        super().__init__(message, detail)
        self.oauth = oauth


class PathUnknown(RegistryError):
    code = "UNSUPPORTED"
    default = "there is nothing at this path"


class MethodUnknown(RegistryError):
    """A method that the resource does not have. The answer lists those it has, in Allow."""

    code = "UNSUPPORTED"
    default = "this method does nothing here"


class TooManyTags(errors.ManifestInvalid):
    default = "the request sets more tags than this registry takes at once"


STATUS: Final[Mapping[type[RegistryError], int]] = {
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
    errors.SizeInvalid: 400,
    errors.RangeInvalid: 416,
    errors.Unauthorized: 401,
    errors.Denied: 403,
    errors.Unsupported: 405,
    errors.TooManyRequests: 429,
    errors.UpstreamUnavailable: 502,
    errors.UpstreamTimeout: 504,
    errors.PartialLost: 502,
    access.AccountInvalid: 400,
    access.AccountUnknown: 404,
    access.AccountExists: 409,
    access.LastAdmin: 409,
    errors.StorageFull: 507,
    errors.StorageFailed: 500,
    errors.TooManyOpenFiles: 503,
    RequestInvalid: 400,
    FormInvalid: 400,
    FormTooLarge: 413,
    BodyTooSlow: 408,
    PathUnknown: 404,
    MethodUnknown: 405,
    TooManyTags: 414,
}
"""The status of each error class. A test checks that none is missing."""


def status_of(error: RegistryError) -> int:
    """Returns the status of an error: its class's, or that of the nearest base class in the table."""
    return next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)


def error_json(code: str, message: str, detail: object = None) -> bytes:
    """Returns an error's JSON in the shape of the spec."""
    error: dict[str, object] = {"code": code, "message": message}
    if detail is not None:
        error["detail"] = detail
    return json.dumps({"errors": [error]}, separators=(",", ":"), default=str).encode("ascii") + b"\n"
