"""Accounts in an htpasswd file: lines with a name and a bcrypt hash, as `htpasswd -B` writes them.

Each look-up checks with one `stat` (a microsecond or two) whether the file has changed, and if so reads it again. So a
changed line takes effect with the next request. A line is ignored if the store has an account of the same name.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from registry.auth.password.hashing import BCRYPT_HASH, bcrypt_cost_of
from storage.access import AccountInvalid, AccountName

log = logging.getLogger(__name__)

MAX_FILE_BYTES: Final = 8 * 1024 * 1024
"""The largest file that is read. It has about a hundred thousand lines."""
SETTLED_NANOSECONDS: Final = 100_000_000
"""A file that changed less than this time before it was read is read again at the next look-up. A second change in so
short a time may leave the timestamps the same."""
STAMP_PREFIX: Final = "htpasswd"
"""The beginning of the stamps of lines. A stamp is a hash that tells whether the source of a login has changed; those
of other sources have other prefixes."""


class HtpasswdError(Exception):
    """The file cannot be used. The text says why, in one line for the operator, and contains no part of the file."""


@dataclass(frozen=True, slots=True)
class HtpasswdLine:
    """One line of the file. `hash` is the bcrypt hash; `stamp` is a hash of the line, so it changes with the line."""

    hash: str
    stamp: str


@dataclass(frozen=True, slots=True)
class _ParsedFile:
    """The content of the file when it was last read.

    - `lines`: the valid lines by account name.
    - `highest_cost`: the highest bcrypt cost in these lines.
    - `version`: a hash of the whole file.
    - `state`: the file's times, inode and size. None: the file must be read again at the next look-up.
    """

    lines: Mapping[str, HtpasswdLine]
    highest_cost: int
    version: str
    state: tuple[int, ...] | None


_EMPTY_FILE = _ParsedFile({}, 0, "", None)


class HtpasswdFile:
    """The current lines of the file at `path`. Has no lines while the file cannot be read."""

    def __init__(self, path: Path, clock: Callable[[], int] = time.time_ns) -> None:
        """Does not read the file yet. `clock` returns nanoseconds since 1970."""
        self._path = path
        self._clock = clock
        self._parsed = _EMPTY_FILE
        self._logged_problem = ""

    def check(self) -> None:
        """Reads and checks the file, at the start of the server. Raises HtpasswdError if the file cannot be read, has
        an invalid line, or has no line."""
        lines, problems = _parse(_decode(_load(self._path), self._path))
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise HtpasswdError(f"{self._path}: {problems[0]}{more}")
        if not lines:
            raise HtpasswdError(f"{self._path} has no line NAME:HASH; `htpasswd -nB NAME` prints one")

    def line(self, name: str) -> HtpasswdLine | None:
        """Returns the line of the account `name`, or None."""
        return self._current().lines.get(name)

    def stamp(self, name: str) -> str | None:
        """Returns the stamp of the line of the account `name`, or None if there is no line."""
        line = self.line(name)
        return line.stamp if line else None

    @property
    def highest_cost(self) -> int:
        """The highest bcrypt cost in the file, or 0 if it has no lines."""
        return self._current().highest_cost

    @property
    def version(self) -> str:
        """A text that changes when the file does."""
        return self._current().version

    def _current(self) -> _ParsedFile:
        """Returns the content of the file, which is read again if it has changed."""
        try:
            status = os.stat(self._path)
        except OSError as error:
            self._log_problem(_unreadable_text(self._path, error))
            self._parsed = _EMPTY_FILE
            return self._parsed
        state = (status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_size)
        if state != self._parsed.state:
            self._reread(state)
        return self._parsed

    def _reread(self, state: tuple[int, ...]) -> None:
        """Reads the file. `state` is its state before the reading."""
        is_settled = self._clock() - max(state[:2]) > SETTLED_NANOSECONDS
        try:
            raw = _load(self._path)
            lines, problems = _parse(_decode(raw, self._path))
        except HtpasswdError as error:
            self._log_problem(str(error))
            self._parsed = _EMPTY_FILE
            return
        highest = max((bcrypt_cost_of(line.hash) for line in lines.values()), default=0)
        version = hashlib.blake2b(raw, digest_size=12).hexdigest()
        self._parsed = _ParsedFile(lines, highest, version, state if is_settled else None)
        self._log_problem("; ".join(problems[:10]))

    def _log_problem(self, text: str) -> None:
        """Logs a problem with the file, unless the last call had the same text. An empty text means no problem."""
        if text and text != self._logged_problem:
            log.warning("htpasswd: %s", text)
        self._logged_problem = text


def _load(path: Path) -> bytes:
    """Returns the bytes of the file. Raises HtpasswdError if it cannot be read or is too large."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise HtpasswdError(_unreadable_text(path, error)) from None
    if len(raw) > MAX_FILE_BYTES:
        raise HtpasswdError(f"{path} has more than {MAX_FILE_BYTES} bytes")
    return raw


def _decode(raw: bytes, path: Path) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise HtpasswdError(f"{path} is not UTF-8 text") from None


def _unreadable_text(path: Path, error: OSError) -> str:
    return f"{path} cannot be read: {(error.strerror or str(error)).lower()}"


def _parse(text: str) -> tuple[dict[str, HtpasswdLine], list[str]]:
    """Returns the valid lines by account name, and a text for each invalid line. If several lines have the same name,
    the first one is used, as Apache does."""
    lines: dict[str, HtpasswdLine] = {}
    problems: list[str] = []
    for number, name, password_hash in _entries(text):
        if problem := _problem(name, password_hash):
            problems.append(f"line {number} {problem}")
        elif name in lines:
            problems.append(f"line {number} has a name for the second time")
        else:
            stamp = hashlib.blake2b(f"{name}:{password_hash}".encode(), digest_size=12).hexdigest()
            lines[name] = HtpasswdLine(password_hash, f"{STAMP_PREFIX}:{stamp}")
    return lines, problems


def _entries(text: str) -> Iterator[tuple[int, str, str]]:
    """Yields the number, the name and the hash of each line that is not empty and no comment."""
    for number, line in enumerate(re.split(r"\r?\n", text), 1):
        if line.strip() and not line.startswith("#"):
            name, _, password_hash = line.strip().partition(":")
            yield number, name, password_hash


def _problem(name: str, password_hash: str) -> str:
    """Returns what is wrong with a line, as the end of a sentence that begins with "line 7". Empty for a valid line."""
    if not password_hash:
        return "is not NAME:HASH"
    try:
        AccountName(name)
    except AccountInvalid:
        return "has a name that no account may have: lower-case letters, digits, '.', '_' and '-' are allowed"
    if not BCRYPT_HASH.fullmatch(password_hash):
        return "is not bcrypt with a cost of 4 to 16; `htpasswd -B` writes such"
    return ""
