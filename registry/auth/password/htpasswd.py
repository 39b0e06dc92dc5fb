"""An htpasswd file as a source of accounts: names and bcrypt hashes, as `htpasswd -B` writes them.

Every look-up checks the file's status (one stat, a microsecond or two) and reads the file again when it has changed, so
a changed line counts from the next request on. An account of the store has precedence over a line.
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
"""Bytes of a file; about a hundred thousand lines."""
SETTLED_NANOSECONDS: Final = 100_000_000
"""A file that was written within this time before it was read may be written again with the same timestamp."""
STAMP_PREFIX: Final = "htpasswd"


class HtpasswdError(Exception):
    """The file cannot be used. The text is one line for the operator and shows nothing of the file."""


@dataclass(frozen=True, slots=True)
class HtpasswdLine:
    """A line's hash, and a stamp that changes with the hash."""

    hash: str
    stamp: str


@dataclass(frozen=True, slots=True)
class _ParsedFile:
    """The content of the file. `version` changes with the text. `state` is the file's status when it was read; None
    means that it has to be read again."""

    lines: Mapping[str, HtpasswdLine]
    highest_cost: int
    version: str
    state: tuple[int, ...] | None


_EMPTY_FILE = _ParsedFile({}, 0, "", None)


class HtpasswdFile:
    """The lines of the file at `path`, always current. While the file cannot be read there are none."""

    def __init__(self, path: Path, clock: Callable[[], int] = time.time_ns) -> None:
        """Reads nothing yet. `clock` gives nanoseconds since 1970."""
        self._path = path
        self._clock = clock
        self._read = _EMPTY_FILE
        self._complaint = ""

    def check(self) -> None:
        """Checks the file at the start. Raises HtpasswdError if it cannot be read, or has lines that are not valid, or
        none."""
        lines, problems = _parse(_text(_load(self._path), self._path))
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise HtpasswdError(f"{self._path}: {problems[0]}{more}")
        if not lines:
            raise HtpasswdError(f"{self._path} has no line NAME:HASH; `htpasswd -nB NAME` prints one")

    def line(self, name: str) -> HtpasswdLine | None:
        """Returns the line of an account, or None."""
        return self._current().lines.get(name)

    def stamp(self, name: str) -> str | None:
        """Returns the stamp of an account's line, or None."""
        line = self.line(name)
        return line.stamp if line else None

    @property
    def highest_cost(self) -> int:
        """The highest bcrypt cost in the file, or 0."""
        return self._current().highest_cost

    @property
    def version(self) -> str:
        """A text that changes when the file does."""
        return self._current().version

    def _current(self) -> _ParsedFile:
        try:
            now = os.stat(self._path)
        except OSError as error:
            self._complain(_unreadable(self._path, error))
            self._read = _EMPTY_FILE
            return self._read
        state = (now.st_mtime_ns, now.st_ctime_ns, now.st_ino, now.st_size)
        if state != self._read.state:
            self._reread(state)
        return self._read

    def _reread(self, state: tuple[int, ...]) -> None:
        settled = self._clock() - max(state[:2]) > SETTLED_NANOSECONDS
        try:
            raw = _load(self._path)
            lines, problems = _parse(_text(raw, self._path))
        except HtpasswdError as error:
            self._complain(str(error))
            self._read = _EMPTY_FILE
            return
        highest = max((bcrypt_cost_of(line.hash) for line in lines.values()), default=0)
        version = hashlib.blake2b(raw, digest_size=12).hexdigest()
        self._read = _ParsedFile(lines, highest, version, state if settled else None)
        self._complain("; ".join(problems[:10]))

    def _complain(self, text: str) -> None:
        """Logs a problem, once for each new text."""
        if text and text != self._complaint:
            log.warning("htpasswd: %s", text)
        self._complaint = text


def _load(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise HtpasswdError(_unreadable(path, error)) from None
    if len(raw) > MAX_FILE_BYTES:
        raise HtpasswdError(f"{path} has more than {MAX_FILE_BYTES} bytes")
    return raw


def _text(raw: bytes, path: Path) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise HtpasswdError(f"{path} is not UTF-8 text") from None


def _unreadable(path: Path, error: OSError) -> str:
    return f"{path} cannot be read: {(error.strerror or str(error)).lower()}"


def _parse(text: str) -> tuple[dict[str, HtpasswdLine], list[str]]:
    """Returns the valid lines by name, and the problems of the others. The first line of a name counts, as for
    Apache."""
    lines: dict[str, HtpasswdLine] = {}
    problems: list[str] = []
    for number, name, held in _entries(text):
        if problem := _problem(name, held):
            problems.append(f"line {number} {problem}")
        elif name in lines:
            problems.append(f"line {number} has a name for the second time")
        else:
            stamp = hashlib.blake2b(f"{name}:{held}".encode(), digest_size=12).hexdigest()
            lines[name] = HtpasswdLine(held, f"{STAMP_PREFIX}:{stamp}")
    return lines, problems


def _entries(text: str) -> Iterator[tuple[int, str, str]]:
    for number, line in enumerate(re.split(r"\r?\n", text), 1):
        if line.strip() and not line.startswith("#"):
            name, _, held = line.strip().partition(":")
            yield number, name, held


def _problem(name: str, held: str) -> str:
    if not held:
        return "is not NAME:HASH"
    try:
        AccountName(name)
    except AccountInvalid:
        return "has a name that no account may have: lower-case letters, digits, '.', '_' and '-' are allowed"
    if not BCRYPT_HASH.fullmatch(held):
        return "is not bcrypt with a cost of 4 to 16; `htpasswd -B` writes such"
    return ""
