"""Reads small files whose path a person has given, such as the settings or a password. Limits the size, because a
device can return bytes without end. Limits the wait for bytes from a pipe, because nobody may write to it."""

from __future__ import annotations

import errno
import io
import os
import select
import stat
from pathlib import Path
from typing import Final

MAX_FILE_BYTES: Final = 16 * 1024**2
"""Size of the largest file that these functions read."""
PIPE_SECONDS: Final = 10.0
"""How long these functions wait for the next bytes from a pipe, such as the pipe of `<(command)` in a shell."""
_CHUNK_BYTES: Final = 64 * 1024


def read_small_text(path: Path) -> str:
    """Returns the text of a file in UTF-8, with `\\n` for all kinds of line breaks. Raises UnicodeDecodeError, and the
    errors of `read_small_file`."""
    return decode_text(read_small_file(path))


def decode_text(content: bytes) -> str:
    """Decodes bytes in UTF-8. Returns the text with `\\n` for all kinds of line breaks. Raises UnicodeDecodeError."""
    return io.StringIO(content.decode("utf-8"), newline=None).read()


def read_small_file(path: Path, pipe_seconds: float = PIPE_SECONDS) -> bytes:
    """Returns the bytes of a file, a device or a pipe. Raises OSError if the file cannot be read, if it has more than
    `MAX_FILE_BYTES`, or if no bytes arrive from a pipe for `pipe_seconds`."""
    # Without O_NONBLOCK, `os.open` of a named pipe would wait for a writer.
    fd = os.open(str(path), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        is_pipe = stat.S_ISFIFO(os.fstat(fd).st_mode)
        os.set_blocking(fd, True)
        content = bytearray()
        while True:
            if is_pipe and not _wait_for_bytes(fd, pipe_seconds):
                raise TimeoutError(errno.ETIMEDOUT, "nothing arrives from this pipe", str(path))
            try:
                chunk = os.read(fd, _CHUNK_BYTES)
            except OSError as error:
                error.filename = str(path)
                raise
            if not chunk:
                return bytes(content)
            content += chunk
            if len(content) > MAX_FILE_BYTES:
                raise OSError(errno.EFBIG, f"larger than {MAX_FILE_BYTES} bytes", str(path))
    finally:
        os.close(fd)


def _wait_for_bytes(fd: int, seconds: float) -> bool:
    """Waits until a pipe has bytes or has no writers any more, and returns True. Returns False after `seconds`."""
    poll = select.poll()  # `select.select` accepts no file descriptors above 1023
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))
