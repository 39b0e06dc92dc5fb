"""Answers that are ready: what was answered before, to the same question by the same client, while nothing has changed.

They are given without a task, without a call on the registry and without a new head: a server that offers it asks
`DistributionAPI.answer_at_once` before it starts the application. Only whole answers to reads are kept, and only those
that follow from the store alone: of a mirrored name time decides as well, and of a blob's HEAD the collector is told.
Why that is so, and what it saves, is in docs/adr/0013-answers-that-are-ready.md.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from registry.http.cross_site import BROWSER_HEADERS
from registry.http.exchange import Exchange, Header, Message, Scope
from registry.http.responses import REQUEST_ID
from storage.names import RepositoryName
from storage.versioned_cache import VersionedCache

CACHED_ANSWER_EXTENSION: Final = "entrepot.at_once"
"""The extension by which a server says in a scope that it asks for ready answers."""
_KEEP: Final = "keep"
CACHE_BYTES: Final = 8 * 1024 * 1024
"""Bytes of answers kept by a process, about."""
LARGEST_BODY_BYTES: Final = 64 * 1024
"""Bytes of a body that is kept."""
_BYPASSING_HEADERS: Final = frozenset(
    {
        *(b"range", b"if-range", b"if-match", b"if-none-match"),
        *(b"expect", b"content-length", b"transfer-encoding"),
        *BROWSER_HEADERS,
    }
)
"""Headers on which an answer depends, that promise a body, or that come from a page in a browser: such a request is
answered anew."""
_READS: Final = ("GET", "HEAD")
_ENTRY_BYTES: Final = 2048
"""What an answer weighs without its body, about, and without what it was asked with."""

CredentialKey = Callable[[Sequence[bytes], str], Hashable | None]
LogCall = Callable[[str, str, str], None]
"""Writes the log line of a call once more: for the name of who acts, their address and the request's id."""


@dataclass(slots=True)
class CachedAnswer:
    """An answer with the status 200. Its headers have that of the request's id between `before` and `after`. `name` is
    who it is for, `named` says that they are an account."""

    before: list[Header]
    after: list[Header]
    body: bytes
    name: str
    named: bool
    calls: list[LogCall]
    rendered: Any = None
    """The server's own: what it has made of it to send it again."""


class AnswerCache:
    """The answers of one process. `version`: see `storage.versioned_cache`. `settled` tells whether reads of a
    repository are answered from the store alone, whenever they come. `by_host`: which repository is meant depends on
    the host that the request was sent to."""

    def __init__(
        self, version: Callable[[], object], settled: Callable[[RepositoryName], bool], *, by_host: bool = False
    ) -> None:
        self._settled = settled
        self._by_host = by_host
        self._keyed = _BYPASSING_HEADERS | {b"authorization"} | ({b"host"} if by_host else set())
        self._answers: VersionedCache[CachedAnswer] = VersionedCache(version, CACHE_BYTES)

    def find(self, scope: Scope, known: CredentialKey) -> CachedAnswer | None:
        """The answer to a request, if there is one. If not, and it is asked for again, its own is worth keeping: the
        scope says under which key, and which version it has to be of. `known`: see `Authenticator`."""
        key = self._key(scope, known)
        if key is None:
            return None
        found = self._answers.get(key)
        if found is None and self._answers.wanted(key):
            scope["extensions"][CACHED_ANSWER_EXTENSION][_KEEP] = key, self._answers.of
        return found

    def watch(self, exchange: Exchange) -> bool:
        """Whether the answer may be kept; if so, the exchange notes from here on what it is made of."""
        if _KEEP not in (exchange.scope.get("extensions") or {}).get(CACHED_ANSWER_EXTENSION, ()):
            return False
        exchange.sent, exchange.calls = [], []
        return True

    def keep(self, exchange: Exchange) -> None:
        """Keeps what `exchange` was answered with, if it is whole and small, and would be answered so again."""
        if exchange.kind == "blobs" and exchange.method == "HEAD":
            return  # each one is noted: who asks is about to push
        if exchange.repo and not self._settled(exchange.repo):
            return
        whole = _whole_answer(exchange.sent or ())
        if whole is None or not exchange.looked_at <= self._keyed:
            return
        key, since = exchange.scope["extensions"][CACHED_ANSWER_EXTENSION][_KEEP]
        before, after, body = whole
        answer = CachedAnswer(before, after, body, exchange.name, exchange.named, exchange.calls or [])
        _, path, _, host = key
        self._answers.keep(key, answer, _ENTRY_BYTES + len(path) + len(host) + 2 * len(body), since)

    def _key(self, scope: Scope, known: CredentialKey) -> tuple[str, bytes, Hashable, bytes] | None:
        """What answers are kept under; None: such a request is always answered anew."""
        if scope["method"] not in _READS or scope["query_string"]:
            return None
        shown, host = [], b""
        for name, value in scope["headers"]:
            if name in _BYPASSING_HEADERS:
                return None
            if name == b"authorization":
                shown.append(value)
            elif name == b"host":
                host = value
        client = scope["client"]
        who = known(shown, client[0] if client else "")
        if who is None:
            return None
        return scope["method"], scope["raw_path"], who, host if self._by_host else b""


def _whole_answer(sent: Sequence[Message]) -> tuple[list[Header], list[Header], bytes] | None:
    """Headers and body of a 200 that was sent in one piece; None: it was not, or is too large."""
    if len(sent) != 2 or sent[0]["status"] != 200 or sent[1]["type"] != "http.response.body":
        return None
    headers: list[Header] = sent[0]["headers"]
    body: bytes = sent[1]["body"]
    if sent[1].get("more_body") or len(body) > LARGEST_BODY_BYTES:
        return None
    at = [name for name, _ in headers].index(REQUEST_ID)
    return headers[:at], headers[at + 1 :], body
