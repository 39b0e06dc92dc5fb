"""Keeps heads (request lines with headers) that were parsed, so that the server does not parse the same bytes again.

The clients of a registry repeat themselves: many machines request the same tag with the same headers. Parsing such a
head takes longer than finding the cached response to it. So all connections of a worker share this cache. Only heads of
GET and HEAD requests without a body are cached, and only if the connection stays open after them. A head is cached when
its bytes arrive for the second time. So a head that arrives only once takes little time and displaces no other head.

Tokens and cookies must not stay in memory. So a head with such a secret is found by a keyed hash of its bytes, and the
cache has the offsets of the secret in the head in place of the secret itself. The hash is `hash()` of Python's `bytes`
(SipHash) with a random key from the start of Python. It is fast, and two heads practically never have the same 64 bits.
A head with a password is not cached.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from registry.asgi import Header, Scope

MAX_HEADS: Final = 256
"""Largest number of heads in the cache. If the cache is full, a new head replaces the head that was added first."""
MAX_HEAD_BYTES: Final = 2048
"""A head whose `RequestHead.size` is larger is not cached. This size counts each short header as 64 bytes, so a head in
the cache has at most 32 headers, and the cache takes about 2 MiB."""
_MAX_SEEN: Final = 4096
"""Number of heads that arrived once and whose hashes are kept. When there are more, all of these hashes are dropped."""
_CACHED_METHODS: Final = ("GET", "HEAD")
_SECRET_HEADERS: Final = frozenset({b"authorization", b"proxy-authorization", b"cookie"})
"""The headers whose values are not kept."""


class CachedHead(NamedTuple):
    """The result of parsing the bytes of a head. It is the same on all connections."""

    fields: dict[str, Any]
    """The items of the ASGI scope that depend on the head alone, without `headers`. Must not be changed."""
    headers: tuple[Header, ...]
    """The headers, with empty values in place of the secrets."""
    size: int
    """As in `RequestHead.size`."""
    secrets: tuple[tuple[int, int, int], ...]
    """For each header with a secret: its index in `headers`, and the offsets of the secret's begin and end in the
    head."""

    def headers_of(self, head: bytes) -> list[Header]:
        """Returns a new list of the headers of `head`, the bytes with which this object was found."""
        headers = [*self.headers]
        for index, start, end in self.secrets:
            headers[index] = headers[index][0], head[start:end]
        return headers


class HeadCache:
    """The cache of one worker process."""

    __slots__ = ("_heads", "_seen_hashes")

    def __init__(self) -> None:
        self._heads: dict[bytes | int, CachedHead] = {}
        """The cached heads by their bytes or, if they have secrets, by the keyed hash of their bytes."""
        self._seen_hashes: set[int] = set()
        """The hashes of heads that arrived once."""

    def find(self, head: bytes) -> CachedHead | None:
        """Returns the cached result of parsing exactly these bytes (up to and with the empty line). Returns None if
        they are not in the cache."""
        return self._heads.get(head) or self._heads.get(hash(head))

    def add(self, head: bytes, scope: Scope, size: int) -> None:
        """Adds a head after which the connection stays open and no body follows. `head`: its bytes. `scope`: the new
        scope of its request. `size`: see `RequestHead.size`. Keeps only the hash if the head arrives for the first
        time. Does nothing if it is too long, has another method than GET and HEAD, or has a password."""
        fingerprint = hash(head)
        if fingerprint not in self._seen_hashes:
            if len(self._seen_hashes) >= _MAX_SEEN:
                self._seen_hashes.clear()
            self._seen_hashes.add(fingerprint)
            return
        if max(size, len(head)) > MAX_HEAD_BYTES or scope["method"] not in _CACHED_METHODS:
            return
        headers: list[Header] = [*scope["headers"]]
        secrets = []
        for index, (name, value) in enumerate(headers):
            if name in _SECRET_HEADERS:
                # If the value also occurs earlier in the head, `start` is its earlier place. That does no harm, because
                # this entry is found only for the same head, which has the same bytes there.
                start = head.find(value)
                if start < 0 or value[:6].lower() == b"basic ":
                    return
                secrets.append((index, start, start + len(value)))
                headers[index] = name, b""
        if len(self._heads) >= MAX_HEADS:
            del self._heads[next(iter(self._heads))]
        fields = {key: scope[key] for key in ("method", "http_version", "path", "raw_path", "query_string")}
        self._heads[fingerprint if secrets else head] = CachedHead(fields, tuple(headers), size, tuple(secrets))
