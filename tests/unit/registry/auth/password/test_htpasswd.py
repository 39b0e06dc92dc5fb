"""The htpasswd file: how it is parsed, when it is read again, and its errors."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

import bcrypt
import pytest

from registry.auth.password.htpasswd import MAX_INLINE_BYTES, SETTLED_NANOSECONDS, HtpasswdError, HtpasswdFile

HASH = bcrypt.hashpw(b"a password", bcrypt.gensalt(4)).decode()
OTHER = bcrypt.hashpw(b"another password", bcrypt.gensalt(5)).decode()
SECRET = "$apr1$verysecret$0123456789abcdefghijkl"


class HtpasswdClock:
    """A clock in nanoseconds, which the test sets."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "htpasswd"


def write(path: Path, text: str) -> None:
    """Writes the file, for tests that run in an event loop."""
    path.write_text(text)


async def test_names_and_hashes_are_read(path: Path) -> None:
    """All names and hashes in the file are read. Comments and empty lines are ignored."""
    write(path, f"# people\n\nalice:{HASH}\r\nbob:{OTHER.replace('$2b$', '$2y$')}\n")
    file = HtpasswdFile(path)
    file.check()
    alice, bob = file.line("alice"), file.line("bob")
    assert alice
    assert bob
    assert alice.hash == HASH
    assert bob.hash.startswith("$2y$05$")
    assert alice.stamp != bob.stamp
    assert HASH not in alice.stamp
    assert file.line("carol") is None
    assert (await file.read_current()).highest_bcrypt_cost == 5


def test_the_next_lookup_sees_a_change(path: Path) -> None:
    """The stamp of a line stands for its content. After a change of the file, the next lookup sees a new stamp for a
    changed line, no stamp for a removed line, and a stamp for an added line. The stamp of an unchanged line stays the
    same. This holds if the file is replaced. It also holds if the file is overwritten in place with the same length and
    the same modification time."""
    path.write_text(f"alice:{HASH}\nbob:{HASH}\n")
    file = HtpasswdFile(path)
    stamps_before = {name: file.stamp(name) for name in ("alice", "bob")}
    stat = path.stat()
    path.write_text(f"alice:{HASH}\nbob:{HASH[:-1]}{'a' if HASH[-1] != 'a' else 'b'}\n")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file.stamp("alice") == stamps_before["alice"]
    assert file.stamp("bob") not in (None, stamps_before["bob"])
    replacement = path.with_name("new")
    replacement.write_text(f"carol:{HASH}\n")
    replacement.rename(path)
    assert [file.stamp(name) for name in ("alice", "bob")] == [None, None]
    assert file.stamp("carol")


def test_unchanged_file_is_not_read_again(path: Path) -> None:
    """If the file was changed some time ago, a lookup does not read it again. If it was changed just now, each lookup
    reads it, because the file could change again without a new modification time."""
    path.write_text(f"alice:{HASH}\n")
    now = HtpasswdClock()
    file = HtpasswdFile(path, now)
    now.now = max(path.stat().st_mtime_ns, path.stat().st_ctime_ns) + SETTLED_NANOSECONDS + 1
    assert file.line("alice") is file.line("alice")
    now.now = path.stat().st_mtime_ns
    young = HtpasswdFile(path, now)
    assert young.line("alice") is not young.line("alice")


def test_file_with_times_in_the_future_is_read_again_only_for_a_moment(path: Path) -> None:
    """A file that was copied from a machine whose clock is ahead is not read by every lookup: it counts as unchanged
    if two reads, some time apart, have seen the same times."""
    path.write_text(f"alice:{HASH}\n")
    now = HtpasswdClock()
    now.now = path.stat().st_ctime_ns + SETTLED_NANOSECONDS + 1
    day_nanoseconds = 86400 * 10**9
    os.utime(path, ns=(now.now, now.now + day_nanoseconds))
    file = HtpasswdFile(path, now)
    assert file.line("alice") is not file.line("alice")
    now.now += SETTLED_NANOSECONDS + 1
    assert file.line("alice") is file.line("alice")
    path.write_text(f"bob:{HASH}\n")
    os.utime(path, ns=(now.now, now.now + day_nanoseconds))
    assert file.line("alice") is None


def large_file(*first_lines: str) -> str:
    """Returns the text of a file with these lines and so many others that a thread parses it."""
    count = MAX_INLINE_BYTES // len(HASH) + 1
    return "".join(f"{line}\n" for line in first_lines) + "".join(f"name-{number}:{HASH}\n" for number in range(count))


async def test_large_file_is_parsed_in_a_thread(path: Path) -> None:
    """While a large file is parsed, the event loop runs other callbacks."""
    write(path, large_file(f"alice:{HASH}"))
    file = HtpasswdFile(path)
    calls: list[str] = []
    asyncio.get_running_loop().call_soon(calls.append, "during the parse")
    content = await file.read_current()
    assert calls == ["during the parse"]
    assert content.lines["alice"].hash == HASH
    assert content.has_name("name-7")


async def test_changed_line_of_a_large_file_takes_effect_during_the_parse(path: Path) -> None:
    """While a thread parses a large file, lookups of single lines give the same results as afterwards. So the password
    of a removed line is refused at once."""
    write(path, large_file(f"alice:{HASH}", f"bob:{HASH}"))
    file = HtpasswdFile(path)
    await file.read_current()
    old_stamp = file.stamp("alice")
    write(path, large_file("# a comment", "carol:x", f"carol:{HASH}", f"carol:{OTHER}", f"alice:{OTHER}\r"))
    names = ("alice", "bob", "carol", "name-0", "ame-0", "# a comment")
    stamps = [file.stamp(name) for name in names]  # no callback of the parse can have run yet
    assert stamps[0] != old_stamp
    assert stamps[1] is None
    assert await file.read_current()
    assert [file.stamp(name) for name in names] == stamps
    assert (await file.read_current()).has_name("carol")


def test_a_missing_file_has_no_lines(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """While the file is missing, lookups find no line, and the log has one warning. When the file exists again, its
    lines are found again."""
    path.write_text(f"alice:{HASH}\n")
    file = HtpasswdFile(path)
    assert file.line("alice")
    path.rename(path.with_name("away"))
    with caplog.at_level(logging.WARNING):
        assert file.line("alice") is None
        assert file.line("alice") is None
    assert [record.getMessage() for record in caplog.records] == [
        f"htpasswd: {path} cannot be read: no such file or directory. Until it can be read, nobody can log in with its "
        "accounts. Repair the file or its permissions; the server then reads it without a restart"
    ]
    path.with_name("away").rename(path)
    assert file.line("alice")


BAD_LINES = [
    (f"alice:{HASH}\ncarol:{SECRET}\n", "line 2 is not bcrypt with a cost of 4 to 16; `htpasswd -B` writes such lines"),
    (f"alice:{HASH}\nnonsense\n", "line 2 is not NAME:HASH"),
    (f"alice:{HASH}\nCarol X:{OTHER}\n", "line 2 has a name that no account may have"),
    (f"alice:{HASH}\neveryone:{OTHER}\n", "line 2 has a name that no account may have"),
    (f"alice:{HASH}\nalice:{OTHER}\n", "line 2 has the same name as an earlier line"),
    (f"alice:{HASH}\ncarol:{OTHER.replace('$05$', '$31$')}\n", "line 2 is not bcrypt with a cost of 4 to 16"),
    (f"alice:{HASH}\ncarol:{OTHER}:x\n", "line 2 is not bcrypt"),
    (f"alice:{HASH}\ncarol:{OTHER}\udcfc\n", "line 2 is not UTF-8 text"),
    (f"alice:{HASH}\nJ\udcfcrgen:{OTHER}\n", "line 2 is not UTF-8 text"),
]
"""The text of a file, in which U+DCFC stands for the byte FC, and a part of the error."""


@pytest.mark.parametrize(("text", "problem"), BAD_LINES, ids=[problem for _, problem in BAD_LINES])
def test_a_bad_line(path: Path, caplog: pytest.LogCaptureFixture, text: str, problem: str) -> None:
    """At the start, a bad line is an error with one line of text. While the server runs, a bad line is ignored with a
    warning, and the other lines are used. Both texts name the number of the line and show nothing of its content."""
    path.write_text(text, errors="surrogateescape")
    file = HtpasswdFile(path)
    with pytest.raises(HtpasswdError) as refused:
        file.check()
    assert problem in str(refused.value)
    with caplog.at_level(logging.WARNING):
        alice = file.line("alice")
    assert alice
    assert alice.hash == HASH
    assert file.line("carol") is None
    assert problem in caplog.text
    for message in (str(refused.value), caplog.text):
        assert SECRET not in message
        assert OTHER not in message
        assert "nonsense" not in message


def test_a_comment_in_another_encoding(path: Path) -> None:
    """A comment that is not UTF-8 text is skipped, as other comments are."""
    path.write_bytes(b"# J\xfcrgen's file\n" + f"alice:{HASH}\n".encode())
    file = HtpasswdFile(path)
    file.check()
    assert file.line("alice")


@pytest.mark.parametrize(
    ("content", "problem"),
    [(None, "cannot be read: no such file"), (b"", "has no line NAME:HASH"), (b"\xff\xfea\0", "is UTF-16 text")],
)
def test_a_bad_file(path: Path, content: bytes | None, problem: str) -> None:
    """A file that is missing, empty or not text is refused at the start, with an error of one line."""
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(HtpasswdError, match=problem):
        HtpasswdFile(path).check()
    assert HtpasswdFile(path).line("alice") is None
