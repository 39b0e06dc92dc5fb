"""Sends error responses for failed requests, and logs the failures that the client did not cause."""

from __future__ import annotations

import logging

from registry.asgi import Header
from registry.http.error_statuses import error_json, status_of
from registry.http.exchange import Exchange
from registry.http.response_headers import ACCEPT_RANGES, JSON, NEVER_STORE, allow_header, upload_headers
from registry.log_output import mark_logged
from storage.errors import (
    DigestInvalid,
    PartialBlobLost,
    RangeInvalid,
    RegistryError,
    StorageFailed,
    StorageFull,
    TooManyOpenFiles,
    TooManyRequests,
    UpstreamUnavailable,
)

log = logging.getLogger("registry.http")


async def send_error(exchange: Exchange, error: RegistryError, *extra_headers: Header) -> None:
    """Sends the response for `error`: its status, its JSON body, the headers that this kind of error needs, and
    `extra_headers`."""
    status = status_of(error)
    body = error_json(error.code, error.message, error.detail)
    headers = (JSON, NEVER_STORE, *_error_headers(exchange, error, status), *extra_headers)
    await exchange.send_whole(status, body, *headers)


async def send_internal_error(exchange: Exchange) -> None:
    """Sends 500 for an unexpected exception. The response does not describe the exception: it gives the request's id,
    with which an operator finds the exception in the log."""
    message = f"the registry failed; the reason is in the registry's log, at the request id {exchange.request_id}"
    await exchange.send_whole(500, error_json("UNKNOWN", message), JSON, NEVER_STORE)


def _error_headers(exchange: Exchange, error: RegistryError, status: int) -> list[Header]:
    """Returns the headers that this kind of error needs: the allowed methods, the number of seconds to wait before a
    retry, the size of the blob, or the state of the upload session. Returns an empty list for other errors."""
    if status == 405:  # the resource does not have the requested method, or the settings forbid the method
        return [allow_header(method for method in exchange.allowed_methods if method != exchange.method)]
    if isinstance(error, TooManyRequests | TooManyOpenFiles | UpstreamUnavailable) and error.retry_after is not None:
        return [(b"retry-after", b"%d" % error.retry_after)]
    if isinstance(error, RangeInvalid) and error.size is not None:
        return [(b"content-range", b"bytes */%d" % error.size), ACCEPT_RANGES]
    if isinstance(error, RangeInvalid) and error.offset is not None:
        upload_id = exchange.resource_id  # from the path
        return upload_headers(exchange.location("blobs/uploads", upload_id), upload_id, error.offset)
    return []


def log_server_error(exchange: Exchange, error: RegistryError) -> None:
    """Logs an error if its status is 500 or more. Other errors were caused by the client, and are not logged.

    The level depends on the error:
    - WARNING for a failure of an upstream, including an interrupted download (PartialBlobLost).
    - ERROR for other errors.
    """
    status = status_of(error)
    if status >= 500:
        level = logging.WARNING if isinstance(error, UpstreamUnavailable | PartialBlobLost) else logging.ERROR
        text = f"request {exchange.request_id} answered {status} {error.code}: {_with_cause(error)}"
        log.log(level, "%s", text, exc_info=error if _needs_traceback(error) else None)


def log_cut_off(exchange: Exchange, error: RegistryError) -> None:
    """Logs that a response was cut off, because `error` was raised after the status had been sent. Marks the error as
    logged, so that the server does not log it again.

    The level depends on the error:
    - ERROR for a failure of the storage.
    - INFO for wrong bytes from an upstream (DigestInvalid). The mirror has logged this error already.
    - WARNING for other errors.
    """
    if isinstance(error, StorageFull | StorageFailed):
        level = logging.ERROR
    else:
        level = logging.INFO if isinstance(error, DigestInvalid) else logging.WARNING
    text = f"request {exchange.request_id} was cut off, {error.code}: {_with_cause(error)}"
    log.log(level, "%s", text, exc_info=error if _needs_traceback(error) else None)
    mark_logged(error)


def _with_cause(error: RegistryError) -> str:
    """Returns the error's text. If an OSError caused the error, appends the OSError in parentheses."""
    return f"{error} ({error.__cause__})" if isinstance(error.__cause__, OSError) else str(error)


def _needs_traceback(error: RegistryError) -> bool:
    """Returns True for a StorageFailed that has a cause other than an OSError. The text of every other error is
    sufficient."""
    return isinstance(error, StorageFailed) and error.__cause__ is not None and not isinstance(error.__cause__, OSError)
