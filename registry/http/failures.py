"""Answers requests that failed, and logs the failures that are not the request's fault."""

from __future__ import annotations

import logging

from registry.http.asgi import Header
from registry.http.errors import error_json, status_of
from registry.http.exchange import Exchange
from registry.http.headers import ACCEPT_RANGES, JSON, NEVER_STORE, allow_header, upload_headers
from registry.log_output import mark_logged
from storage.errors import (
    DigestInvalid,
    PartialLost,
    RangeInvalid,
    RegistryError,
    StorageFailed,
    StorageFull,
    TooManyOpenFiles,
    TooManyRequests,
    UpstreamUnavailable,
)

log = logging.getLogger("registry.http")


async def send_error(exchange: Exchange, error: RegistryError, *more: Header) -> None:
    """Sends an error, with `more` headers."""
    status = status_of(error)
    body = error_json(error.code, error.message, error.detail)
    await exchange.send_whole(status, body, JSON, NEVER_STORE, *_error_headers(exchange, error, status), *more)


async def send_failure(exchange: Exchange) -> None:
    """Sends 500 for an unexpected exception, which only the log describes."""
    message = f"the registry failed; its log says more under request {exchange.request_id}"
    await exchange.send_whole(500, error_json("UNKNOWN", message), JSON, NEVER_STORE)


def _error_headers(exchange: Exchange, error: RegistryError, status: int) -> list[Header]:
    if status == 405:
        return [allow_header(method for method in exchange.allowed if method != exchange.method)]
    if isinstance(error, TooManyRequests | TooManyOpenFiles | UpstreamUnavailable) and error.retry_after is not None:
        return [(b"retry-after", b"%d" % error.retry_after)]
    if isinstance(error, RangeInvalid) and error.size is not None:
        return [(b"content-range", b"bytes */%d" % error.size), ACCEPT_RANGES]
    if isinstance(error, RangeInvalid) and error.offset is not None:
        return upload_headers(exchange.location("blobs/uploads", exchange.item), exchange.item, error.offset)
    return []


def log_failure(exchange: Exchange, error: RegistryError) -> None:
    """Logs an error that is answered with a status of 500 or more."""
    status = status_of(error)
    if status >= 500:
        level = logging.WARNING if isinstance(error, UpstreamUnavailable | PartialLost) else logging.ERROR
        text = f"request {exchange.request_id} answered {status} {error.code}: {_with_cause(error)}"
        log.log(level, "%s", text, exc_info=error if _needs_traceback(error) else None)


def log_cut(exchange: Exchange, error: RegistryError) -> None:
    """Logs an answer that breaks off after its head, in one line, whoever catches the error next: none of these is a
    fault of the program. Wrong bytes from an upstream were logged when they were fetched."""
    if isinstance(error, StorageFull | StorageFailed):
        level = logging.ERROR
    else:
        level = logging.INFO if isinstance(error, DigestInvalid) else logging.WARNING
    text = f"request {exchange.request_id} was cut off, {error.code}: {_with_cause(error)}"
    log.log(level, "%s", text, exc_info=error if _needs_traceback(error) else None)
    mark_logged(error)


def _with_cause(error: RegistryError) -> str:
    """Returns the error's text, with that of the operating system's error."""
    return f"{error} ({error.__cause__})" if isinstance(error.__cause__, OSError) else str(error)


def _needs_traceback(error: RegistryError) -> bool:
    """Returns whether the store failed for another reason than an error of the operating system."""
    return isinstance(error, StorageFailed) and error.__cause__ is not None and _with_cause(error) == str(error)
