"""Response cache: returns a stored response when the same client repeats a request and the store has not changed.

An *answer* is a complete response to a GET or HEAD. For each request, our server first calls
`DistributionAPI.answer_at_once`, a plain function that returns the cached answer. If no answer is cached, the server
starts a task that calls the application through ASGI.

A cached answer must depend on nothing but the request and the store. Two kinds of answers are not cached:

- An answer for a mirrored repository also depends on the time since the mirror last asked the upstream.
- A HEAD of a blob has to reach the store each time, because the store then protects the blob from the garbage collector
  for a while.

docs/adr/0013-cached-responses.md gives the reasons and the savings.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from registry.asgi import Header, Message, Scope
from registry.http.cross_site import BROWSER_HEADERS
from registry.http.exchange import Exchange
from registry.http.response_headers import REQUEST_ID_NAME
from storage.content import Pull
from storage.names import RepositoryName
from storage.versioned_cache import VersionedCache

CACHED_ANSWER_EXTENSION: Final = "entrepot.at_once"
"""Key in `scope["extensions"]` that our server sets when it calls `answer_at_once`. The value is a dictionary."""
_CACHE_AS: Final = "cache_as"
"""Key in the dictionary of `CACHED_ANSWER_EXTENSION`. `AnswerCache.find` sets it if the answer should be cached. The
value says under what to cache the answer. It is a pair: the cache key for the answer, and the store's version before
the answer is made. The cache never returns the answer for another version of the store."""
CACHE_BYTES: Final = 24 * 1024 * 1024
"""Approximate size of all answers that a process caches. This is enough for the manifests of 10,000 tags."""
LARGEST_BODY_BYTES: Final = 64 * 1024
"""An answer with a larger body is not cached."""
_BYPASSING_HEADERS: Final = frozenset(
    {
        *(b"range", b"if-range", b"if-match", b"if-none-match"),
        *(b"expect", b"content-length", b"transfer-encoding"),
        *BROWSER_HEADERS,
    }
)
"""Headers that change the answer, announce a body, or are sent only by browsers. A request with any of them bypasses
the cache: its answer is neither taken from the cache nor cached."""
_READ_METHODS: Final = ("GET", "HEAD")
_ENTRY_BYTES: Final = 1536
"""Approximate memory of a cached answer without its body and cache key."""

MakeCredentialKey = Callable[[Sequence[bytes], str], Hashable | None]
"""A function that returns a key for the principal (account or anonymous client) of a request, or None if the request
has to bypass the cache. The arguments are the values of the request's Authorization headers, and the client's address.
See `registry.http.www_authenticate.Authenticator.credential_key`."""


@dataclass(slots=True)
class CachedAnswer:
    """A cached answer. Its status is 200.

    - `headers_before_id` and `headers_after_id`: the headers before and after the request id header, whose value is new
      for each response. Both are empty once the server has encoded them in `rendered`.
    - `principal_name`: the name of the principal that the answer is for.
    - `has_account`: whether this principal is an account.
    - `pull`: each request that gets this answer is a pull of this manifest. None: such a request is not a pull.
    - `kind`, `repo` and `resource_id`: the resource, as in `Exchange`."""

    headers_before_id: list[Header]
    headers_after_id: list[Header]
    body: bytes
    principal_name: str
    has_account: bool
    pull: Pull | None
    kind: str
    repo: str
    resource_id: str
    rendered: Any = None
    """The server stores the encoded headers here when it sends the answer for the first time; None until then."""
    metric_cells: Any = None
    """`registry.telemetry.request_recorder` stores here what it needs to count the requests that get this answer: the
    indexes of two counters (requests, and sent bytes), and the size of the body. None until the first request
    gets this answer."""
    log_fields: Any = None
    """`registry.telemetry.access_log` stores here the part that all log lines about this answer have in common. None
    until the first of these lines is written."""


class AnswerCache:
    """The cached answers of one process.

    `version` returns the store's version, which changes with every change of the store. `is_always_hosted` returns
    whether every answer for a repository comes from the store, now and later, and never from a mirror. `by_host`: True
    if the same path can name different repositories at different hosts; then the cache key includes the Host header."""

    def __init__(
        self,
        version: Callable[[], object],
        is_always_hosted: Callable[[RepositoryName], bool],
        *,
        by_host: bool = False,
    ) -> None:
        self._is_always_hosted = is_always_hosted
        self._by_host = by_host
        # An answer is cached only if it depends on no other request headers than these. Authorization and, with
        # `by_host`, Host are part of the cache key. A request with one of `_BYPASSING_HEADERS` bypasses the cache.
        self._covered_headers = _BYPASSING_HEADERS | {b"authorization"} | ({b"host"} if by_host else set())
        self._answers: VersionedCache[CachedAnswer] = VersionedCache(version, CACHE_BYTES)

    def find(self, scope: Scope, make_credential_key: MakeCredentialKey) -> CachedAnswer | None:
        """Returns the cached answer to a request; None: no answer is cached.

        If no answer is cached and `VersionedCache.should_cache` returns True, stores the cache key and the store's
        version in the scope (`_CACHE_AS`), for `start_recording` and `save`."""
        key = self._key(scope, make_credential_key)
        if key is None:
            return None
        answer = self._answers.get(key)
        if answer is None and self._answers.should_cache(key):
            scope["extensions"][CACHED_ANSWER_EXTENSION][_CACHE_AS] = key, self._answers.last_version
        return answer

    def start_recording(self, exchange: Exchange) -> bool:
        """If `find` has stored a cache key in the scope, makes `exchange` record the answer, and returns True. The
        caller must then call `save` after the answer is sent. Otherwise returns False."""
        if _CACHE_AS not in (exchange.scope.get("extensions") or {}).get(CACHED_ANSWER_EXTENSION, ()):
            return False
        exchange.sent_messages = []
        return True

    def save(self, exchange: Exchange, make_credential_key: MakeCredentialKey) -> None:
        """Caches the answer that `exchange` has recorded, if it is complete and small, and depends on nothing but the
        cache key and the store.

        Caches nothing if the request has another cache key now than in `find`. The key changes if another process adds
        the first account of the registry: without accounts, all clients have the same key."""
        if exchange.kind == "blobs" and exchange.method == "HEAD":
            return  # each HEAD has to reach the store, which then protects the blob
        if exchange.repo and not self._is_always_hosted(exchange.repo):
            return
        complete = _complete_answer(exchange.sent_messages or ())
        if complete is None or not exchange.headers_read <= self._covered_headers:
            return  # the answer may depend on a header that is not in the cache key
        key, version = exchange.scope["extensions"][CACHED_ANSWER_EXTENSION][_CACHE_AS]
        if self._key(exchange.scope, make_credential_key) != key:
            return
        before, after, body = complete
        answer = CachedAnswer(
            *(before, after, body, exchange.principal_name, exchange.has_account, exchange.pull),
            *(exchange.kind, exchange.repo, exchange.resource_id),
        )
        self._answers.put(key, answer, _ENTRY_BYTES + len(body), version)  # the cache adds the size of the key

    def _key(self, scope: Scope, make_credential_key: MakeCredentialKey) -> tuple[str, bytes, Hashable, bytes] | None:
        """Returns the cache key of a request; None: the request bypasses the cache."""
        if scope["method"] not in _READ_METHODS or scope["query_string"]:
            return None
        authorization, host = [], b""
        for name, value in scope["headers"]:
            if name in _BYPASSING_HEADERS:
                return None
            if name == b"authorization":
                authorization.append(value)
            elif name == b"host":
                host = value
        client = scope["client"]
        credential_key = make_credential_key(authorization, client[0] if client else "")
        if credential_key is None:
            return None
        return scope["method"], scope["raw_path"], credential_key, host if self._by_host else b""


def _complete_answer(sent: Sequence[Message]) -> tuple[list[Header], list[Header], bytes] | None:
    """Returns three parts of a response: the headers before the request id header, the headers after it, and the body.
    `sent`: the ASGI messages of the response. Returns None if the status is not 200, if the body was sent in several
    messages, or if it is larger than `LARGEST_BODY_BYTES`."""
    if len(sent) != 2 or sent[0]["status"] != 200 or sent[1]["type"] != "http.response.body":
        return None
    headers: list[Header] = sent[0]["headers"]
    body: bytes = sent[1]["body"]
    if sent[1].get("more_body") or len(body) > LARGEST_BODY_BYTES:
        return None
    index = [name for name, _ in headers].index(REQUEST_ID_NAME)
    return headers[:index], headers[index + 1 :], body
