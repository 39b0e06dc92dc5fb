"""Accounts in an htpasswd file: lines with a name and a bcrypt hash, as `htpasswd -B` writes them.

Each lookup of a line checks with one `stat` (a microsecond or two) whether the file has changed, and if so reads it
again. So a changed line takes effect with the next request. If the store has an account of the same name,
`registry.auth.password.password_check` uses that account and not the line.
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
"""The size of the largest file that is accepted. Such a file has about a hundred thousand lines."""
SETTLED_NANOSECONDS: Final = 100_000_000
"""If the file changed less than this time before it was read, the next lookup reads it again. The timestamps can stay
the same when the file changes twice in a short time, and then `stat` alone would miss the second change."""
STAMP_PREFIX: Final = "htpasswd"
"""The prefix of the *stamp* of a line, a hash of that line. An identity that the line's password proved contains the
stamp, and is refused when the line has changed. The stamps of token issuers and of the OpenID provider have other
prefixes."""


class HtpasswdError(Exception):
    """The file cannot be used. The text says why, in one line for the operator, and contains no part of the file."""


@dataclass(frozen=True, slots=True)
class HtpasswdLine:
    """One valid line of the file. `hash` is the bcrypt hash of the password. `stamp` is a hash of the line. It changes
    when the line changes."""

    hash: str
    stamp: str


@dataclass(frozen=True, slots=True)
class _ParsedFile:
    """The content of the file when it was last read.

    - `lines`: the valid lines by account name.
    - `highest_bcrypt_cost`: the highest bcrypt cost in these lines; 0 if there are none.
    - `version`: a hash of the whole file; empty if it could not be read.
    - `state`: the file's times, inode and size. None: the next lookup must read the file again.
    """

    lines: Mapping[str, HtpasswdLine]
    highest_bcrypt_cost: int
    version: str
    state: tuple[int, ...] | None


_EMPTY_FILE = _ParsedFile(lines={}, highest_bcrypt_cost=0, version="", state=None)
"""The content that is used before the first lookup, and while the file cannot be read."""


class HtpasswdFile:
    """The current lines of the file at `path`. While the file cannot be read, there are no lines."""

    def __init__(self, path: Path, clock: Callable[[], int] = time.time_ns) -> None:
        """Does not read the file; the first lookup does. `clock` returns nanoseconds since 1970."""
        self._path = path
        self._clock = clock
        self._parsed = _EMPTY_FILE
        self._logged_problem = ""
        """The problem that was logged last; empty if the last read found none."""

    def check(self) -> None:
        """Reads and checks the file. The server calls this when it starts. Raises HtpasswdError if the file cannot be
        read, has an invalid line, or has no line at all."""
        lines, problems = _parse(_decode(_load(self._path), self._path))
        if problems:
            more_problems = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise HtpasswdError(f"{self._path}: {problems[0]}{more_problems}")
        if not lines:
            raise HtpasswdError(f"{self._path} has no line NAME:HASH; `htpasswd -nB NAME` prints one")

    def line(self, name: str) -> HtpasswdLine | None:
        """Returns the line of the account `name`, or None if there is none."""
        return self._current().lines.get(name)

    def stamp(self, name: str) -> str | None:
        """Returns the stamp of the line of the account `name`, or None if there is none."""
        line = self.line(name)
        return line.stamp if line else None

    @property
    def highest_bcrypt_cost(self) -> int:
        """The highest bcrypt cost in the file, or 0 if it has no lines."""
        return self._current().highest_bcrypt_cost

    @property
    def version(self) -> str:
        """A hash of the file. It changes when the file changes. Empty while the file cannot be read."""
        return self._current().version

    def _current(self) -> _ParsedFile:
        """Returns the current content of the file. Reads the file again if it has changed since the last read."""
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
        """Reads and parses the file. `state` has the times, inode and size that `stat` reported before this read."""
        is_settled = self._clock() - max(state[:2]) > SETTLED_NANOSECONDS  # `state` begins with the file's two times
        try:
            content = _load(self._path)
            lines, problems = _parse(_decode(content, self._path))
        except HtpasswdError as error:
            self._log_problem(str(error))
            self._parsed = _EMPTY_FILE
            return
        highest_cost = max((bcrypt_cost_of(line.hash) for line in lines.values()), default=0)
        version = hashlib.blake2b(content, digest_size=12).hexdigest()
        self._parsed = _ParsedFile(lines, highest_cost, version, state if is_settled else None)
        self._log_problem("; ".join(problems[:10]))

    def _log_problem(self, text: str) -> None:
        """Logs a problem with the file, unless it is the one that was logged last. An empty `text` means that the file
        has no problem."""
        if text and text != self._logged_problem:
            log.warning("htpasswd: %s", text)
        self._logged_problem = text


def _load(path: Path) -> bytes:
    """Returns the bytes of the file. Raises HtpasswdError if the file cannot be read or is too large."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise HtpasswdError(_unreadable_text(path, error)) from None
    if len(content) > MAX_FILE_BYTES:
        raise HtpasswdError(f"{path} has more than {MAX_FILE_BYTES} bytes")
    return content


def _decode(content: bytes, path: Path) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise HtpasswdError(f"{path} is not UTF-8 text") from None


def _unreadable_text(path: Path, error: OSError) -> str:
    return f"{path} cannot be read: {(error.strerror or str(error)).lower()}"


def _parse(text: str) -> tuple[dict[str, HtpasswdLine], list[str]]:
    """Returns the valid lines by account name, and a description of each invalid line. If several lines have the same
    name, the first is valid and the others are invalid; Apache uses the first as well."""
    lines: dict[str, HtpasswdLine] = {}
    problems: list[str] = []
    for line_number, name, password_hash in _entries(text):
        if problem := _problem(name, password_hash):
            problems.append(f"line {line_number} {problem}")
        elif name in lines:
            problems.append(f"line {line_number} has the same name as an earlier line")
        else:
            stamp = hashlib.blake2b(f"{name}:{password_hash}".encode(), digest_size=12).hexdigest()
            lines[name] = HtpasswdLine(password_hash, f"{STAMP_PREFIX}:{stamp}")
    return lines, problems


def _entries(text: str) -> Iterator[tuple[int, str, str]]:
    """Yields the line number, the name and the hash of each line. Skips empty lines and comments."""
    for line_number, line in enumerate(re.split(r"\r?\n", text), 1):
        if line.strip() and not line.startswith("#"):
            name, _, password_hash = line.strip().partition(":")
            yield line_number, name, password_hash


def _problem(name: str, password_hash: str) -> str:
    """Returns what is wrong with a line that has this name and this hash. The text ends a sentence that begins with
    "line 7". It is empty if the line is valid."""
    if not password_hash:
        return "is not NAME:HASH"
    try:
        AccountName(name)
    except AccountInvalid:
        return "has a name that no account may have: lower-case letters, digits, '.', '_' and '-' are allowed"
    if not BCRYPT_HASH.fullmatch(password_hash):
        return "is not bcrypt with a cost of 4 to 16; `htpasswd -B` writes such lines"
    return ""
