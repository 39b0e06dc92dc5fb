"""Keeps parsed parts of heads (request lines with headers), so that the server does not parse the same bytes again.

The clients of a registry repeat themselves: a client sends the same headers with each request, and many machines
request the same tag. Many responses are cached by the application (`cached_answers`), and finding such a response takes
less time than parsing the head of the request. So all connections of a worker share this cache. It keeps request lines
and *header blocks* (all header lines of a head, up to the empty line) separately. A head is found if its block was
parsed before; its line may be new.

Only parts of GET and HEAD requests without a body are cached, and only if the connection stays open after them. A part
is cached when its bytes arrive for the second time. So a part that arrives only once takes little time and displaces no
other part.

Tokens and cookies must not stay in memory. So a block with such a secret is found by a keyed hash of its bytes. The
cache does not keep the secret, only the offsets at which the block has it. The hash is `hash()` of Python's `bytes`
(SipHash) with a random key from the start of Python. It is fast, and two blocks practically never have the same 64
bits. Blocks with a password are not cached, nor are lines with a query.
"""

from __future__ import annotations

import re
from typing import Any, Final, NamedTuple

from registry.asgi import Header, Scope
from registry.server.http1.request_head import unquoted

MAX_PARTS: Final = 256
"""Largest number of lines, and of blocks, in the cache. If the cache is full, a new part replaces the part of its kind
that was added first."""
MAX_HEAD_BYTES: Final = 2048
"""The parts of a head whose `RequestHead.size` is larger are not cached. This size is the length of the request target
plus the lengths of all headers, where each short header counts as 64 bytes. So a block in the cache has at most 32
headers, and the cache takes about 2 MiB."""
_MAX_SEEN: Final = 4096
"""Number of parts that arrived once and whose hashes are kept. When there are more, all of these hashes are dropped."""
_SIMPLE_LINE: Final = re.compile(rb"(GET|HEAD) (/[A-Za-z0-9._~:@/?&=+,;%-]*) HTTP/1\.1")
"""A request line of a usual form, which is valid. The parser has to check any other line."""
_SECRET_HEADERS: Final = frozenset({b"authorization", b"proxy-authorization", b"cookie"})
"""The headers whose values are not kept."""


_ParsedLine = tuple[dict[str, Any], int]
"""The items of the ASGI scope that depend on a request line, and the length of the request target in bytes. The
dictionary of the items must not be changed."""


class _CachedBlock(NamedTuple):
    headers: tuple[Header, ...]
    """The headers, with empty values in place of the secrets."""
    size: int
    """The share of the block in `RequestHead.size`."""
    secrets: tuple[tuple[int, int, int], ...]
    """For each header with a secret: its index in `headers`, and the offsets of the secret's begin and end in the
    block."""

    def headers_of(self, block: bytes) -> list[Header]:
        """Returns a new list of the headers of `block`, the bytes with which this object was found."""
        headers = [*self.headers]
        for index, start, end in self.secrets:
            headers[index] = headers[index][0], block[start:end]
        return headers


class HeadCache:
    """The cache of one worker process."""

    __slots__ = ("_blocks", "_lines", "_seen_hashes")

    def __init__(self) -> None:
        self._blocks: dict[bytes | int, _CachedBlock] = {}
        """The cached blocks by their bytes or, if they have secrets, by the keyed hash of their bytes. The bytes begin
        with the CRLF at the end of the request line."""
        self._lines: dict[bytes, _ParsedLine] = {}
        """The cached request lines, by their bytes."""
        self._seen_hashes: set[int] = set()
        """The hashes of parts that arrived once."""

    def find(self, head: bytes) -> tuple[dict[str, Any], list[Header], int] | None:
        """Finds the parts of the head with exactly these bytes (up to and with the empty line). Returns the items of
        the ASGI scope that depend on the request line, a new list of the headers, and the size of the head
        (`RequestHead.size`). The dictionary of the items must not be changed. Returns None if the head has to be
        parsed, because its block is not in the cache or its line is unusual."""
        line_end = head.find(b"\r\n")
        block = head[line_end:]
        cached = self._blocks.get(block) or self._blocks.get(hash(block))
        if cached is None:
            return None
        line = head[:line_end]
        parsed_line = self._lines.get(line) or self._parse_line(line)
        if parsed_line is None:
            return None
        fields, target_bytes = parsed_line
        headers = cached.headers_of(block) if cached.secrets else [*cached.headers]
        return fields, headers, target_bytes + cached.size

    def add(self, head: bytes, scope: Scope, size: int) -> None:
        """Adds the block of a head after which the connection stays open and no body follows. `head`: its bytes.
        `scope`: the new scope of its request. `size`: see `RequestHead.size`. Keeps only the hash if the block arrives
        for the first time. Does nothing if the head is too long, has an unusual line or another method than GET and
        HEAD, or has a password."""
        line_end = head.find(b"\r\n")
        block = head[line_end:]
        fingerprint = hash(block)
        if not self._was_seen(fingerprint):
            return
        # A line with a target in absolute form (`http://host/path`) is not simple. With such a target, the headers in
        # `scope` are not those of the block: the host of the target has replaced the Host header.
        simple = _SIMPLE_LINE.fullmatch(head, 0, line_end)
        if simple is None or max(size, len(head)) > MAX_HEAD_BYTES:
            return
        headers: list[Header] = [*scope["headers"]]
        secrets = []
        for index, (name, value) in enumerate(headers):
            if name in _SECRET_HEADERS:
                # If the value also occurs earlier in the block, `start` is its earlier place. That does no harm,
                # because this entry is found only for the same block, which has the same bytes there.
                start = block.find(value)
                if start < 0 or value[:6].lower() == b"basic ":
                    return
                secrets.append((index, start, start + len(value)))
                headers[index] = name, b""
        _make_room(self._blocks)
        cached = _CachedBlock(tuple(headers), size - len(simple[2]), tuple(secrets))
        self._blocks[fingerprint if secrets else block] = cached

    def _parse_line(self, line: bytes) -> _ParsedLine | None:
        """Parses a request line. Returns None if the parser has to check the line. Caches the result if the line
        arrives for the second time and has no query."""
        simple = _SIMPLE_LINE.fullmatch(line)
        if simple is None or len(line) > MAX_HEAD_BYTES:
            return None
        method = simple[1].decode("ascii")
        path, _, query = simple[2].partition(b"?")
        fields = {
            "method": method,
            "http_version": "1.1",
            "path": unquoted(path),
            "raw_path": path,
            "query_string": query,
        }
        parsed = fields, len(simple[2])
        if b"?" not in line and self._was_seen(hash(line)):
            _make_room(self._lines)
            self._lines[line] = parsed
        return parsed

    def _was_seen(self, fingerprint: int) -> bool:
        """Returns whether a part with this hash has arrived before, as far as hashes are kept. Keeps the hash."""
        if fingerprint in self._seen_hashes:
            return True
        if len(self._seen_hashes) >= _MAX_SEEN:
            self._seen_hashes.clear()
        self._seen_hashes.add(fingerprint)
        return False


def _make_room(parts: dict[Any, Any]) -> None:
    """Removes the part that was added first if there are `MAX_PARTS` parts."""
    if len(parts) >= MAX_PARTS:
        del parts[next(iter(parts))]
