"""Tests of the limits for files that a person has named, such as the settings."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from registry.config.settings_sources import ConfigError, load_settings
from registry.small_files import MAX_FILE_BYTES, read_small_file, read_small_text


def test_settings_without_an_end_are_refused() -> None:
    """A settings file without an end, such as /dev/zero, is refused with a sentence that has the limit."""
    with pytest.raises(ConfigError) as caught:
        load_settings({}, Path("/dev/zero"))
    assert str(caught.value) == f"/dev/zero: cannot read the settings: larger than {MAX_FILE_BYTES} bytes"


def test_the_largest_file(tmp_path: Path) -> None:
    """A file of `MAX_FILE_BYTES` is read, and a larger one is refused."""
    file = tmp_path / "file"
    file.write_bytes(b"x" * MAX_FILE_BYTES)
    assert len(read_small_file(file)) == MAX_FILE_BYTES
    os.truncate(file, MAX_FILE_BYTES + 1)
    with pytest.raises(OSError, match="larger than"):
        read_small_file(file)


def test_a_named_pipe_without_a_writer(tmp_path: Path) -> None:
    """If nobody writes to a named pipe, the read ends with an error that names the pipe."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(TimeoutError, match=f"nothing arrives from this pipe: '{tmp_path / 'pipe'}'"):
        read_small_file(tmp_path / "pipe", pipe_seconds=0.01)


def test_a_named_pipe_with_a_later_writer(tmp_path: Path) -> None:
    """What is written later into a named pipe is read to its end."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("read_only = true\r\n",))
    writer.start()
    assert read_small_text(pipe) == "read_only = true\n"
    writer.join()


def test_settings_in_a_pipe() -> None:
    """Settings can come from an unnamed pipe, as `<(command)` of a shell makes it."""
    reader, writer = os.pipe()
    os.write(writer, b"read_only = true\n")
    os.close(writer)
    assert load_settings({}, Path(f"/dev/fd/{reader}")).settings.read_only
    os.close(reader)


def test_a_directory_and_a_missing_file(tmp_path: Path) -> None:
    """The errors of a directory, and of a file that does not exist, have the path."""
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(OSError, match=f"'{path}'"):
            read_small_file(path)
