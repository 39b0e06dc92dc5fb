"""Response cache: returns a stored response when the same client repeats a request and the store has not changed.

A cached answer takes no task, no call on the registry and no new head: a server that supports it calls
`DistributionAPI.answer_at_once` before it starts the application. Only complete answers to reads are cached, and only
those that depend on the store alone. An answer under a mirrored name depends on time as well, and a blob's HEAD has to
be recorded for the garbage collector. docs/adr/0013-answers-that-are-ready.md has the reasons and the savings.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from registry.http.asgi import Header, Message, Scope
from registry.http.cross_site import BROWSER_HEADERS
from registry.http.exchange import Exchange
from registry.http.headers import REQUEST_ID
from registry.request import LogCall
from storage.names import RepositoryName
from storage.versioned_cache import VersionedCache

CACHED_ANSWER_EXTENSION: Final = "entrepot.at_once"
"""The ASGI extension by which a server says that it asks for cached answers."""
_STORE: Final = "store"
CACHE_BYTES: Final = 8 * 1024 * 1024
"""Bytes of answers that a process caches, about."""
LARGEST_BODY_BYTES: Final = 64 * 1024
"""Bytes of a body that is cached."""
_BYPASSING_HEADERS: Final = frozenset(
    {
        *(b"range", b"if-range", b"if-match", b"if-none-match"),
        *(b"expect", b"content-length", b"transfer-encoding"),
        *BROWSER_HEADERS,
    }
)
"""Headers that change the answer, announce a body, or come from a browser: the cache is not used for requests with
them."""
_READS: Final = ("GET", "HEAD")
_ENTRY_BYTES: Final = 2048
"""Bytes of an entry without its body and key, about."""

CredentialKey = Callable[[Sequence[bytes], str], Hashable | None]
"""See `registry.http.challenge.Authenticator.credential_key`."""


@dataclass(slots=True)
class CachedAnswer:
    """An answer with the status 200. The header with the request's id goes between `before` and `after`. `name`: the
    principal it is for; `is_account`: that is an account."""

    before: list[Header]
    after: list[Header]
    body: bytes
    name: str
    is_account: bool
    logged_calls: list[LogCall]
    rendered: Any = None
    """For the server: its own form of the answer, kept to send it again."""


class AnswerCache:
    """The cached answers of one process. `version`: see `storage.versioned_cache`. `is_always_hosted` returns whether
    the store alone answers every read of a repository, now and later. `by_host`: the host that a request was sent to
    is part of the repository's name."""

    def __init__(
        self,
        version: Callable[[], object],
        is_always_hosted: Callable[[RepositoryName], bool],
        *,
        by_host: bool = False,
    ) -> None:
        self._is_always_hosted = is_always_hosted
        self._by_host = by_host
        self._headers_in_key = _BYPASSING_HEADERS | {b"authorization"} | ({b"host"} if by_host else set())
        self._answers: VersionedCache[CachedAnswer] = VersionedCache(version, CACHE_BYTES)

    def find(self, scope: Scope, credential_key: CredentialKey) -> CachedAnswer | None:
        """Returns the cached answer to a request. Without one, and if the same request came before, notes in the scope
        that its answer is worth caching, with the key and the version it has to have."""
        key = self._key(scope, credential_key)
        if key is None:
            return None
        found = self._answers.get(key)
        if found is None and self._answers.should_cache(key):
            scope["extensions"][CACHED_ANSWER_EXTENSION][_STORE] = key, self._answers.last_version
        return found

    def record(self, exchange: Exchange) -> bool:
        """Returns whether the answer may be cached; if so, makes the exchange record it."""
        if _STORE not in (exchange.scope.get("extensions") or {}).get(CACHED_ANSWER_EXTENSION, ()):
            return False
        exchange.sent_messages, exchange.logged_calls = [], []
        return True

    def store(self, exchange: Exchange) -> None:
        """Caches the answer of `exchange`, if it is complete and small and the same request would get it again."""
        if exchange.kind == "blobs" and exchange.method == "HEAD":
            return  # each one has to be recorded, since its client is about to push
        if exchange.repo and not self._is_always_hosted(exchange.repo):
            return
        whole = _whole_answer(exchange.sent_messages or ())
        if whole is None or not exchange.headers_read <= self._headers_in_key:
            return
        key, since = exchange.scope["extensions"][CACHED_ANSWER_EXTENSION][_STORE]
        before, after, body = whole
        answer = CachedAnswer(before, after, body, exchange.name, exchange.is_account, exchange.logged_calls or [])
        _, path, _, host = key
        self._answers.put(key, answer, _ENTRY_BYTES + len(path) + len(host) + 2 * len(body), since)

    def _key(self, scope: Scope, credential_key: CredentialKey) -> tuple[str, bytes, Hashable, bytes] | None:
        """Returns the cache key of a request; None: the cache is not used for it."""
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
        credential = credential_key(shown, client[0] if client else "")
        if credential is None:
            return None
        return scope["method"], scope["raw_path"], credential, host if self._by_host else b""


def _whole_answer(sent: Sequence[Message]) -> tuple[list[Header], list[Header], bytes] | None:
    """Returns the headers, before and after the request's id, and the body of a 200 that was sent as a whole; None for
    any other answer, and for one that is too large."""
    if len(sent) != 2 or sent[0]["status"] != 200 or sent[1]["type"] != "http.response.body":
        return None
    headers: list[Header] = sent[0]["headers"]
    body: bytes = sent[1]["body"]
    if sent[1].get("more_body") or len(body) > LARGEST_BODY_BYTES:
        return None
    at = [name for name, _ in headers].index(REQUEST_ID)
    return headers[:at], headers[at + 1 :], body
