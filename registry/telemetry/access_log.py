"""The access log: the logger `registry.access` writes one line for each HTTP request.

A line has the fields of `_TEXT`. In the log format `json`, each field is a field of the JSON object.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final, Protocol

from registry.asgi import Header, Scope, client_address, raw_path, trace_id_of
from registry.log_output import direct_handler
from registry.printable import printable_line
from registry.request import USER_AGENT_CHARACTERS

log = logging.getLogger("registry.access")

_TEXT: Final = (
    "%(method)s %(path)s status=%(status)s bytes=%(bytes)d received=%(received)d ms=%(ms).1f principal=%(principal)s "
    "address=%(address)s repository=%(repository)s reference=%(reference)s cache=%(cache)s request=%(request)s "
    "trace=%(trace)s agent=%(agent)s"
)
"""The text of a line.

- `cache`: `answer` if the response comes from the response cache. Otherwise, for mirrored content: where the mirror
  found the content, such as `hit` for the store. For all other requests: `-`.
- `status`: 0 if no response was begun. If the response is incomplete, the text `(cut off)` follows the status."""
_REFUSED_TEXT: Final = _TEXT.replace(" agent=", ' reason="%(reason)s" agent=')
"""The text of a line about a request that the HTTP server, not the application, has refused. `agent` stays last,
because a client could put the text of other fields into its User-Agent."""
_MAX_PATH_CHARACTERS: Final = 1024
"""Longer paths are cut to this length."""
_MAX_REFERENCE_CHARACTERS: Final = 256
"""Longer values of the fields `reference` and `reason` are cut to this length."""


class LoggedAnswer(Protocol):
    """A response from the response cache (`registry.http.answer_cache.CachedAnswer`)."""

    principal_name: str
    repo: str
    resource_id: str
    body: bytes
    log_fields: Any
    """The parts of the log line that are the same for all requests with this response: a tuple of the text before
    `address`, and the text from `repository` to `cache`. None until the first line is written."""


def write_cached_answer(scope: Scope, answer: LoggedAnswer, request_id: str) -> None:
    """Writes the line of a request that the response cache has answered. If the log goes to stderr as text, passes the
    line to the log handler directly, without making a `logging.LogRecord`. Call this function only if `log` is enabled
    for INFO."""
    handler = direct_handler(log)
    if handler is None:
        principal, repo, resource_id = answer.principal_name, answer.repo, answer.resource_id
        write_request(scope, 200, "", len(answer.body), 0, 0.0, principal, repo, resource_id, "answer", request_id)
        return
    if answer.log_fields is None:
        size = len(answer.body)
        answer.log_fields = (
            f"{scope['method']} {_path(scope)} status=200 bytes={size} received=0 ms=0.0 "
            f"principal={answer.principal_name or '-'}",
            f"repository={answer.repo or '-'} reference={_reference(answer.resource_id)} cache=answer",
        )
    handler.write_later(
        "registry.access", _cached_message, *answer.log_fields, client_address(scope), request_id, scope["headers"]
    )


def write_request(
    scope: Scope,
    status: int,
    status_suffix: str,
    sent_bytes: int,
    received_bytes: int,
    seconds: float,
    principal: str,
    repo: str,
    resource_id: str,
    cache_state: str,
    request_id: str,
    reason: str = "",
) -> None:
    """Writes the line of a request. `status_suffix`: the text after the status. `resource_id`: a tag, a digest or the
    id of an upload session. `reason`: why the HTTP server, not the application, has refused the request; empty if it
    has not. Call this function only if `log` is enabled for INFO."""
    handler = direct_handler(log)
    agent, trace = _agent_and_trace(scope["headers"])
    address, resource_id = client_address(scope) or "-", resource_id[:_MAX_REFERENCE_CHARACTERS]
    reason = _plain(reason, _MAX_REFERENCE_CHARACTERS).replace('"', "'") if reason else ""
    if handler is not None:
        handler.write_later(
            *("registry.access", _message, scope["method"], raw_path(scope)[:_MAX_PATH_CHARACTERS], status),
            *(status_suffix, sent_bytes, received_bytes, seconds, principal, address, repo, resource_id),
            *(cache_state, request_id, trace, agent[:USER_AGENT_CHARACTERS], reason),
        )
        return
    fields: dict[str, object] = {
        "method": scope["method"] or "-",
        "path": _path(scope) or "-",
        "status": f"{int(status)}{status_suffix}" if status_suffix else int(status),
        "bytes": sent_bytes,
        "received": received_bytes,
        "ms": seconds * 1000,
        "principal": principal or "-",
        "address": address,
        "repository": repo or "-",
        "reference": _reference(resource_id),
        "cache": cache_state or "-",
        "request": request_id,
        "trace": trace,
        "agent": _agent(agent),
    }
    if reason:
        fields["reason"] = reason
    log.info(_REFUSED_TEXT if reason else _TEXT, fields)


def _cached_message(
    before_address: str, after_address: str, address: str, request_id: str, headers: Sequence[Header]
) -> str:
    """Returns the text of a line about a response from the response cache. `before_address`, `after_address`: the two
    texts in `LoggedAnswer.log_fields`."""
    agent, trace = _agent_and_trace(headers)
    return (
        f"{before_address} address={address or '-'} {after_address} request={request_id} trace={trace} "
        f"agent={_agent(agent)}"
    )


def _agent_and_trace(headers: Sequence[Header]) -> tuple[bytes, str]:
    """Returns the User-Agent and the trace id of a request. If the request has no User-Agent, the first value is empty.
    If the request has no trace id, the second value is `-`. Uses only one loop, because every request calls this."""
    agent, has_traceparent = b"", False
    for name, value in headers:
        if name == b"user-agent":
            agent = agent or value
        elif name == b"traceparent":
            has_traceparent = True
    return agent, (trace_id_of(headers) or "-") if has_traceparent else "-"


def _message(
    method: str,
    path: bytes,
    status: int,
    status_suffix: str,
    sent_bytes: int,
    received_bytes: int,
    seconds: float,
    principal: str,
    address: str,
    repo: str,
    resource_id: str,
    cache_state: str,
    request_id: str,
    trace: str,
    agent: bytes,
    reason: str,
) -> str:
    """Returns the text of a line. `method`, `path`, `address`, `trace` and `agent` come from the request. The other
    parameters are those of `write_request`."""
    reason_field = f' reason="{reason}"' if reason else ""
    return (
        f"{method or '-'} {path.decode('ascii', 'replace') or '-'} status={int(status)}{status_suffix} "
        f"bytes={sent_bytes} received={received_bytes} ms={seconds * 1000:.1f} principal={principal or '-'} "
        f"address={address} repository={repo or '-'} reference={_reference(resource_id)} cache={cache_state or '-'} "
        f"request={request_id} trace={trace}{reason_field} agent={_agent(agent)}"
    )


def _path(scope: Scope) -> str:
    return raw_path(scope)[:_MAX_PATH_CHARACTERS].decode("ascii", "replace")


@lru_cache(1024)
def _reference(resource_id: str) -> str:
    """Returns the field `reference` of a line. `resource_id`: a tag, a digest or the id of an upload session, already
    cut to `_MAX_REFERENCE_CHARACTERS`, because `lru_cache` keeps it."""
    return _plain(resource_id, _MAX_REFERENCE_CHARACTERS).replace(" ", "?")  # a space would end the field


def _agent(value: bytes) -> str:
    """Returns the field `agent` of a line. Cuts the User-Agent `value` to its largest length, because `_plain_agent`
    keeps its argument in a cache."""
    return _plain_agent(value[:USER_AGENT_CHARACTERS])


@lru_cache(1024)
def _plain_agent(value: bytes) -> str:
    """Converts a User-Agent that `_agent` has cut into the text of the field `agent` (`_plain`)."""
    return _plain(value.decode("latin-1"), USER_AGENT_CHARACTERS)


def _plain(text: str, max_characters: int) -> str:
    """Returns a client's text for a log line: cut to `max_characters`, and without characters that begin a new line or
    control a terminal. Returns `-` if the text is empty."""
    return printable_line(text[:max_characters]) or "-"
