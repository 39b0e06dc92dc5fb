"""Keeps parsed parts of heads (request lines with headers), so that the server does not parse the same bytes again.

Most clients send the same headers with each request, and many clients request the same tag. All connections of a
worker share this cache. It has two kinds of *parts*: request lines, and *header blocks* (all header lines of a head, up
to the empty line). A head is found if its block is in the cache. The request line of the head may be new: the cache can
parse a request line of the usual form.

Only parts of GET and HEAD requests without a body are cached, and only if the connection stays open after the request.
A part is cached when its bytes arrive for the second time, so a part that arrives only once displaces no other part.

Tokens and cookies must not stay in memory. So for a block with such a secret, the cache keeps a keyed hash instead of
the block's bytes, and the offsets of the secret in the block instead of the secret. The hash is Python's `hash()` of
`bytes` (SipHash), whose random key Python chooses when it starts. Two blocks practically never have the same 64-bit
hash. Blocks with a password and request lines with a query are not cached.
"""

from __future__ import annotations

import re
from typing import Any, Final, NamedTuple

from registry.asgi import Header, Scope
from registry.server.http1.request_head import decode_path

MAX_PARTS: Final = 256
"""The cache has at most this many request lines, and at most this many blocks. At this limit, a new request line
replaces the oldest request line, and a new block replaces the oldest block."""
MAX_HEAD_BYTES: Final = 2048
"""A longer request line is not cached. A block is cached only if neither of these exceeds the limit:

- The length of the whole head.
- `RequestHead.size`: the length of the request target plus the lengths of all headers. A header of less than 64 bytes
  counts as 64 bytes. 2048 / 64 is 32, and the request target counts as well, so a cached block has fewer than 32
  headers.

With these limits, the cache takes about 2 MiB."""
_MAX_SEEN_HASHES: Final = 4096
"""Largest number of hashes in `HeadCache._seen_hashes`. At this limit, a new hash replaces all the older hashes."""
_SIMPLE_LINE: Final = re.compile(rb"(GET|HEAD) (/[A-Za-z0-9._~:@/?&=+,;%-]*) HTTP/1\.1")
"""A request line of the *usual form*. The cache leaves any other request line to the parser."""
_SECRET_HEADERS: Final = frozenset({b"authorization", b"proxy-authorization", b"cookie"})
"""The headers whose values are not kept."""


_ParsedLine = tuple[dict[str, Any], int]
"""The items of the ASGI scope that depend on a request line, and the length of the request target in bytes. The
dictionary of the items must not be changed."""


class _CachedBlock(NamedTuple):
    headers: tuple[Header, ...]
    """The headers, with empty values in place of the secrets."""
    size: int
    """The block's share of `RequestHead.size`, in bytes."""
    secrets: tuple[tuple[int, int, int], ...]
    """For each header with a secret: its index in `headers`, and the offsets of the secret's begin and end in the
    block."""

    def headers_of(self, block: bytes) -> list[Header]:
        """Returns a new list of the headers, with the secrets from `block`, the received bytes of this block."""
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
        """The hashes of request lines and blocks that have arrived."""

    def find(self, head: bytes) -> tuple[dict[str, Any], list[Header], int] | None:
        """Finds the parts of a head. `head`: the bytes of the head, including the empty line. Returns the items of the
        ASGI scope that depend on the request line, a new list of the headers, and the size of the head
        (`RequestHead.size`). The dictionary of the items must not be changed. Returns None if the block is not in the
        cache, or if the request line is too long or does not have the usual form. The parser then has to parse the
        head."""
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
        """Adds the block of a head. Call this only if no body follows the head, and the connection stays open after the
        request. If the block arrives for the first time, keeps only its hash. Does not add the block if the head is too
        long, if it contains a password, or if its request line does not have the usual form.

        - `head`: the bytes of the head, including the empty line.
        - `scope`: the new ASGI scope of the request.
        - `size`: the size of the head (`RequestHead.size`)."""
        line_end = head.find(b"\r\n")
        block = head[line_end:]
        block_hash = hash(block)
        if not self._was_seen(block_hash):
            return
        # A line with a target in absolute form (`http://host/path`) does not match. With such a target, the headers in
        # `scope` are not those of the block: the host of the target has replaced the Host header.
        line_match = _SIMPLE_LINE.fullmatch(head, 0, line_end)
        if line_match is None or max(size, len(head)) > MAX_HEAD_BYTES:
            return
        headers: list[Header] = [*scope["headers"]]
        secrets = []
        for index, (name, value) in enumerate(headers):
            if name in _SECRET_HEADERS:
                # The same bytes may occur earlier in the block by chance. `start` is then the offset of the earlier
                # occurrence. `headers_of` still gets the right value, because its block has the same bytes as this one.
                start = block.find(value)
                if start < 0 or value[:6].lower() == b"basic ":
                    return
                secrets.append((index, start, start + len(value)))
                headers[index] = name, b""
        _make_room(self._blocks)
        cached = _CachedBlock(tuple(headers), size - len(line_match[2]), tuple(secrets))
        self._blocks[block_hash if secrets else block] = cached

    def _parse_line(self, line: bytes) -> _ParsedLine | None:
        """Parses a request line of the usual form. Returns None if the line has another form or is too long. Caches the
        result if the line arrives for the second time and has no query."""
        line_match = _SIMPLE_LINE.fullmatch(line)
        if line_match is None or len(line) > MAX_HEAD_BYTES:
            return None
        method = line_match[1].decode("ascii")
        path, _, query = line_match[2].partition(b"?")
        fields = {
            "method": method,
            "http_version": "1.1",
            "path": decode_path(path),
            "raw_path": path,
            "query_string": query,
        }
        parsed = fields, len(line_match[2])
        if b"?" not in line and self._was_seen(hash(line)):
            _make_room(self._lines)
            self._lines[line] = parsed
        return parsed

    def _was_seen(self, part_hash: int) -> bool:
        """Returns whether `_seen_hashes` contains the hash of a part. Adds the hash if it is missing."""
        if part_hash in self._seen_hashes:
            return True
        if len(self._seen_hashes) >= _MAX_SEEN_HASHES:
            self._seen_hashes.clear()
        self._seen_hashes.add(part_hash)
        return False


def _make_room(parts: dict[Any, Any]) -> None:
    """If there are `MAX_PARTS` parts, removes the part that was added first."""
    if len(parts) >= MAX_PARTS:
        del parts[next(iter(parts))]
