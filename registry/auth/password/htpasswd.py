"""An htpasswd file as a source of accounts: names and bcrypt hashes, as `htpasswd -B` writes them.

The file is looked at with each question (one stat, a microsecond or two) and read again when it has changed, so a line
that is removed or changed counts from the next request on. An account of the store has precedence over a line.
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

LARGEST_FILE: Final = 8 * 1024 * 1024
"""Bytes of a file; about a hundred thousand lines."""
SETTLED_NANOSECONDS: Final = 100_000_000
"""Nanoseconds. A file that was written so shortly before it was read may be written once more with the same time."""
STAMP_PREFIX: Final = "htpasswd"


class HtpasswdError(Exception):
    """The file cannot be used; the text is one line for a person and holds nothing of the file."""


@dataclass(frozen=True, slots=True)
class HtpasswdLine:
    """`stamp` differs for another hash, and so for another password."""

    hash: str
    stamp: str


@dataclass(frozen=True, slots=True)
class _ParsedFile:
    """`version` differs for another text, `state` is the file's when it was read; None: it has to be read again."""

    lines: Mapping[str, HtpasswdLine]
    highest_cost: int
    version: str
    state: tuple[int, ...] | None


_EMPTY_FILE = _ParsedFile({}, 0, "", None)


class HtpasswdFile:
    """The lines of the file at `path`, as of now. While it cannot be read there are none."""

    def __init__(self, path: Path, clock: Callable[[], int] = time.time_ns) -> None:
        """`clock`: nanoseconds since 1970. Reads nothing yet."""
        self._path = path
        self._clock = clock
        self._read = _EMPTY_FILE
        self._complaint = ""

    def check(self) -> None:
        """For the start. Raises HtpasswdError: it cannot be read, or holds what is no bcrypt line."""
        lines, problems = _parse(_text(_load(self._path), self._path))
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise HtpasswdError(f"{self._path}: {problems[0]}{more}")
        if not lines:
            raise HtpasswdError(f"{self._path} has no line NAME:HASH; `htpasswd -nB NAME` prints one")

    def line(self, name: str) -> HtpasswdLine | None:
        """None: there is no such line."""
        return self._fresh().lines.get(name)

    def stamp(self, name: str) -> str | None:
        line = self.line(name)
        return line.stamp if line else None

    @property
    def highest_cost(self) -> int:
        """The highest cost of a hash in the file; 0: it has none."""
        return self._fresh().highest_cost

    @property
    def version(self) -> str:
        """Differs once the file has changed."""
        return self._fresh().version

    def _fresh(self) -> _ParsedFile:
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
        dearest = max((bcrypt_cost_of(line.hash) for line in lines.values()), default=0)
        version = hashlib.blake2b(raw, digest_size=12).hexdigest()
        self._read = _ParsedFile(lines, dearest, version, state if settled else None)
        self._complain("; ".join(problems[:10]))

    def _complain(self, text: str) -> None:
        """Once for each new problem."""
        if text and text != self._complaint:
            log.warning("htpasswd: %s", text)
        self._complaint = text


def _load(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            raw = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise HtpasswdError(_unreadable(path, error)) from None
    if len(raw) > LARGEST_FILE:
        raise HtpasswdError(f"{path} has more than {LARGEST_FILE} bytes")
    return raw


def _text(raw: bytes, path: Path) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise HtpasswdError(f"{path} is not UTF-8 text") from None


def _unreadable(path: Path, error: OSError) -> str:
    return f"{path} cannot be read: {(error.strerror or str(error)).lower()}"


def _parse(text: str) -> tuple[dict[str, HtpasswdLine], list[str]]:
    """The lines that can be used, by name, and what is wrong with the others. The first line of a name counts, as it
    does for Apache."""
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
