"""Accounts in an htpasswd file: lines with a name and a bcrypt hash, as `htpasswd -B` writes them.

Each lookup calls `stat` (a microsecond or two), and reads the file again if the file has changed. A change therefore
takes effect with the next request. A thread parses a large file. Until the thread has finished, a lookup searches the
file's text for the account's line. If the store and the file have an account of the same name,
`registry.auth.password.password_check` uses the account in the store.
"""

from __future__ import annotations

import asyncio
import codecs
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from registry.auth.password.hashing import BCRYPT_HASH, bcrypt_cost_of
from registry.printable import is_utf8
from storage.access import AccountInvalid, AccountName

log = logging.getLogger(__name__)

MAX_FILE_BYTES: Final = 8 * 1024 * 1024
"""The size of the largest file that is accepted. Such a file has about a hundred thousand lines."""
MAX_INLINE_BYTES: Final = 64 * 1024
"""The size of the largest file that is parsed on the event loop: about a thousand lines, which take about 5 ms."""
SETTLED_NANOSECONDS: Final = 100_000_000
"""A file that changes twice in a short time can keep its timestamps at the second change, so that `stat` misses the
second change. Each lookup therefore reads the file again until the last change is longer ago than this time, in
nanoseconds. `HtpasswdFile._is_settled` also handles timestamps in the future."""
STAMP_PREFIX: Final = "htpasswd"
"""The prefix of the *stamp* of a line. The stamp contains a hash of the line, so it changes when the line changes. A
login with the line's password gives the client an *identity*: a record of the account that the client has proved to
own. The identity contains the stamp. When the line has changed, the server refuses the identity. The stamps of token
issuers and of the OpenID provider have other prefixes."""


class HtpasswdError(Exception):
    """The file cannot be used. The text says why, in one line for the operator, and contains no part of the file."""


class _Unreadable(HtpasswdError):
    """The file cannot be read at the moment, so the next lookup has to try again."""


@dataclass(frozen=True, slots=True)
class HtpasswdLine:
    """One valid line of the file. `hash` is the bcrypt hash of the password. `stamp` changes when the line changes
    (`STAMP_PREFIX`)."""

    hash: str
    stamp: str


@dataclass(frozen=True, slots=True)
class HtpasswdContent:
    """The content of the file when it was read.

    - `lines`: the valid lines, by account name.
    - `invalid_names`: the names in lines whose name or hash is invalid. Nobody can log in with such a line.
    - `highest_bcrypt_cost`: the highest bcrypt cost in the valid lines; 0 if there are none.
    - `version`: a hash of the whole file; empty if the file could not be read.
    """

    lines: Mapping[str, HtpasswdLine]
    invalid_names: frozenset[str]
    highest_bcrypt_cost: int
    version: str

    @property
    def is_readable(self) -> bool:
        """Whether the file could be read."""
        return bool(self.version)

    def may_have_unusable_line(self, name: str) -> bool:
        """Returns True in two cases:

        - The file could not be read, so it may have a line for the account `name`.
        - The file has lines for the account `name`, but none of them is valid."""
        return not self.is_readable or (name in self.invalid_names and name not in self.lines)

    def has_name(self, name: str) -> bool:
        """Returns whether the file has a line for the account `name`, even an invalid one."""
        return name in self.lines or name in self.invalid_names


EMPTY_CONTENT: Final = HtpasswdContent(lines={}, invalid_names=frozenset(), highest_bcrypt_cost=0, version="")
"""The content if the settings name no file, before the first lookup, and while the file cannot be read."""
_ADVICE: Final = (
    ". Until it can be read, nobody can log in with its accounts. Repair the file or its permissions; the server then "
    "reads it without a restart"
)
"""The end of the log line that says why the file cannot be read."""
_State = tuple[int, ...]
"""The state of the file: its timestamps (`st_mtime_ns`, `st_ctime_ns`), inode and size."""
_Parsed = tuple[HtpasswdContent, list[str]]
"""The content of a file, and a description of each invalid line."""


@dataclass(frozen=True, slots=True)
class _RunningParse:
    """The parsing of a large file in a thread.

    - `state`: the file's state when it was read.
    - `is_settled`: what `HtpasswdFile._is_settled` returned for `state`.
    - `text`: the file's text.
    - `future`: becomes done with the result of the thread.
    """

    state: _State
    is_settled: bool
    text: str
    future: asyncio.Future[_Parsed]

    def find(self, name: str) -> HtpasswdLine | None:
        """Returns the first valid line of the account `name`, or None if there is none. Searches the text without
        parsing the other lines. Does not find a line with a space before the name: such a line takes effect when the
        thread has finished."""
        start, needle = 0, f"\n{name}:"
        text = self.text
        # The loop below does not find the first line, because no line feed precedes it.
        if text.startswith(needle[1:]) and (line := _line_for(name, text[: _line_end(text, 0)])):
            return line
        while (start := text.find(needle, start)) >= 0:
            end = _line_end(text, start + 1)
            if line := _line_for(name, text[start + 1 : end]):
                return line
            start = end
        return None


class HtpasswdFile:
    """The current lines of the file at `path`. While the file cannot be read, there are no lines. A file of more than
    `MAX_INLINE_BYTES` is parsed in a thread, so that the event loop is not blocked."""

    def __init__(self, path: Path, clock: Callable[[], int] = time.time_ns) -> None:
        """Does not read the file; the first lookup does. `clock` returns nanoseconds since 1970."""
        self._path = path
        self._clock = clock
        self._content = EMPTY_CONTENT
        self._state: _State | None = None
        """The state of the file when `_content` was read. None: the next lookup must read the file again."""
        self._last_seen_state: _State | None = None
        """The state of the file at the last read."""
        self._state_first_seen = 0
        """The time of the first read that saw `_last_seen_state`, in nanoseconds since 1970."""
        self._running_parse: _RunningParse | None = None
        self._logged_problem = ""
        """The problem that was logged last; empty if the last read found none."""

    def check(self) -> None:
        """Reads and checks the file. The server calls this when it starts. Raises HtpasswdError if the file cannot be
        read, has an invalid line, or has no line at all."""
        lines, _, problems = _parse_lines(_decode(_load(self._path), self._path))
        if problems:
            more_problems = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise HtpasswdError(f"{self._path}: {problems[0]}{more_problems}")
        if not lines:
            raise HtpasswdError(f"{self._path} has no line NAME:HASH; `htpasswd -nB NAME` prints one")

    async def read_current(self) -> HtpasswdContent:
        """Returns the current content of the file. Each call reads the file if it has changed. So a caller that needs
        several facts should call this once. If the caller is cancelled while a thread parses the file, the thread
        continues."""
        parse = self._refresh()
        if parse is None:
            return self._content
        content, _ = await asyncio.shield(parse.future)
        return content

    def line(self, name: str) -> HtpasswdLine | None:
        """Returns the valid line of the account `name`, or None if there is none."""
        parse = self._refresh()
        return self._content.lines.get(name) if parse is None else parse.find(name)

    def stamp(self, name: str) -> str | None:
        """Returns the stamp of the account's valid line, or None if there is none."""
        line = self.line(name)
        return line.stamp if line else None

    def _refresh(self) -> _RunningParse | None:
        """Reads the file if it has changed since the last read. If a thread is still parsing the file, returns the
        running parse. Returns None if `_content` is current."""
        try:
            status = os.stat(self._path)
        except OSError as error:
            self._store(EMPTY_CONTENT, None, _unreadable_text(self._path, error))
            return None
        state = (status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_size)
        if state == self._state:
            return None
        if self._running_parse is not None and self._running_parse.state == state:
            return self._running_parse
        is_settled = self._is_settled(state)
        try:
            file_bytes = _load(self._path)
            text = _decode(file_bytes, self._path)
        except HtpasswdError as error:
            # If True, the file need not be read again until its state changes: until then, the error stays the same.
            error_lasts_until_change = is_settled and not isinstance(error, _Unreadable)
            self._store(EMPTY_CONTENT, state if error_lasts_until_change else None, str(error))
            return None
        if len(file_bytes) > MAX_INLINE_BYTES and (loop := _running_loop()):
            future = loop.run_in_executor(None, _parse, file_bytes, text)
            self._running_parse = _RunningParse(state, is_settled, text, future)
            future.add_done_callback(partial(self._on_parsed, self._running_parse))
            return self._running_parse
        content, problems = _parse(file_bytes, text)
        # At most ten problems, so that the log line stays short.
        self._store(content, state if is_settled else None, "; ".join(problems[:10]))
        return None

    def _is_settled(self, state: _State) -> bool:
        """Returns whether any later change of the file will also change its state. If so, the file need not be read
        again until its state changes. Returns True in two cases:

        - The last change was more than `SETTLED_NANOSECONDS` ago.
        - A read more than `SETTLED_NANOSECONDS` ago saw the same state. This case is for timestamps in the future.
        """
        now = self._clock()
        if state != self._last_seen_state:
            self._last_seen_state, self._state_first_seen = state, now
        last_change = max(state[:2])  # `state` begins with the file's two timestamps
        return now - last_change > SETTLED_NANOSECONDS or abs(now - self._state_first_seen) > SETTLED_NANOSECONDS

    def _on_parsed(self, parse: _RunningParse, future: asyncio.Future[_Parsed]) -> None:
        """Called when a thread has parsed the file. Stores the result, unless the thread failed or a later lookup has
        read the file again."""
        if self._running_parse is not parse or future.cancelled() or future.exception():
            return
        content, problems = future.result()
        self._store(content, parse.state if parse.is_settled else None, "; ".join(problems[:10]))

    def _store(self, content: HtpasswdContent, state: _State | None, problem: str) -> None:
        """Stores the result of a read. `problem`: the problem that the read found, or empty. Logs `problem`, unless
        the previous read found the same problem."""
        self._content, self._state, self._running_parse = content, state, None
        if problem and problem != self._logged_problem:
            log.warning("htpasswd: %s%s", problem, "" if content.is_readable else _ADVICE)
        self._logged_problem = problem


def _running_loop() -> asyncio.AbstractEventLoop | None:
    """Returns the running event loop, or None if no event loop runs, such as in a command."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _load(path: Path) -> bytes:
    """Returns the bytes of the file. Raises HtpasswdError if the file cannot be read or is too large."""
    try:
        with path.open("rb") as file:
            file_bytes = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise _Unreadable(_unreadable_text(path, error)) from None
    if len(file_bytes) > MAX_FILE_BYTES:
        raise HtpasswdError(f"{path} has more than {MAX_FILE_BYTES} bytes")
    return file_bytes


def _decode(file_bytes: bytes, path: Path) -> str:
    """Returns the file's text. Bytes that are not UTF-8 make only their own line invalid; in a comment, they are
    ignored. Raises HtpasswdError for UTF-16, in which some editors save text."""
    if file_bytes.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise HtpasswdError(f"{path} is UTF-16 text; save it as UTF-8")
    return file_bytes.decode(errors="surrogateescape")


def _unreadable_text(path: Path, error: OSError) -> str:
    return f"{path} cannot be read: {(error.strerror or str(error)).lower()}"


def _parse(file_bytes: bytes, text: str) -> _Parsed:
    """Parses the file. `text`: the decoded `file_bytes`."""
    lines, invalid_names, problems = _parse_lines(text)
    highest_cost = max((bcrypt_cost_of(line.hash) for line in lines.values()), default=0)
    version = hashlib.blake2b(file_bytes, digest_size=12).hexdigest()
    return HtpasswdContent(lines, frozenset(invalid_names), highest_cost, version), problems


def _parse_lines(text: str) -> tuple[dict[str, HtpasswdLine], set[str], list[str]]:
    """Returns the valid lines by account name, the names in lines whose name or hash is invalid, and a description of
    each invalid line. Of several lines with the same name and a valid hash, only the first is valid, as in Apache."""
    lines: dict[str, HtpasswdLine] = {}
    invalid_names: set[str] = set()
    problems: list[str] = []
    for line_number, name, password_hash in _entries(text):
        if problem := _problem(name, password_hash):
            problems.append(f"line {line_number} {problem}")
            invalid_names.add(name)
        elif name in lines:
            problems.append(f"line {line_number} has the same name as an earlier line")
        else:
            lines[name] = _valid_line(name, password_hash)
    return lines, invalid_names, problems


def _valid_line(name: str, password_hash: str) -> HtpasswdLine:
    stamp = hashlib.blake2b(f"{name}:{password_hash}".encode(), digest_size=12).hexdigest()
    return HtpasswdLine(password_hash, f"{STAMP_PREFIX}:{stamp}")


def _line_end(text: str, start: int) -> int:
    """Returns the position of the first line feed at or after `start`, or the length of the text if there is none."""
    end = text.find("\n", start)
    return len(text) if end < 0 else end


def _line_for(name: str, line: str) -> HtpasswdLine | None:
    """Parses one line. Returns None if the line is invalid or is not for the account `name`."""
    for _, line_name, password_hash in _entries(line):
        if line_name == name and not _problem(name, password_hash):
            return _valid_line(name, password_hash)
    return None


def _entries(text: str) -> Iterator[tuple[int, str, str]]:
    """Yields the line number, the name and the hash of each line. Skips empty lines and comments."""
    for line_number, line in enumerate(text.split("\n"), 1):  # `strip` below removes a carriage return
        if line.strip() and not line.startswith("#"):
            name, _, password_hash = line.strip().partition(":")
            yield line_number, name, password_hash


def _problem(name: str, password_hash: str) -> str:
    """Returns what is wrong with a line that has this name and this hash; empty if the line is valid. The caller puts
    "line 7", or another number, before the text."""
    if not is_utf8(name + password_hash):
        return "is not UTF-8 text"
    if not password_hash:
        return "is not NAME:HASH"
    try:
        AccountName(name)
    except AccountInvalid:
        return "has a name that no account may have: lower-case letters, digits, '.', '_' and '-' are allowed"
    if not BCRYPT_HASH.fullmatch(password_hash):
        return "is not bcrypt with a cost of 4 to 16; `htpasswd -B` writes such lines"
    return ""
