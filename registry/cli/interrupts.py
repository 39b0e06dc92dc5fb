"""Handles SIGINT (Ctrl-C) and SIGTERM, so that they end a command quickly.

Python's KeyboardInterrupt is not enough: libraries catch it, threads that wait for the network never see it, and Python
does not exit before such threads have ended. A command that ends abruptly loses no data, because the storage makes each
write durable before it acknowledges the write. A later command or server removes incomplete files.

`entrepot serve` uses this module only during its start, until the server installs its own signal handlers.
"""

from __future__ import annotations

import os
import select
import signal
import termios
from collections.abc import Callable, Coroutine
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

if TYPE_CHECKING:
    import asyncio

T = TypeVar("T")

INTERRUPTED = "interrupted"
"""The default reason that an interrupted command prints on stderr, after `entrepot: `."""
CLEANUP_SECONDS = 3.0
"""Maximum number of seconds for the cleanup after the first signal. After a longer cleanup, the command would seem to
hang."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SHOW_CURSOR_AND_END_LINE = b"\x1b[?25h\n"
"""Written to a terminal before the command's last line. Shows the cursor, which a progress bar hides, and ends the line
in which the terminal has printed `^C`."""


class SignalExit:
    """A callable that prints one line with the reason on stderr and ends the process immediately, with the exit code
    128 + the signal's number. It can be called in any thread.

    The constructor saves the terminal's settings, and the call restores them. So construct the object before a password
    prompt, or other code, changes the settings.
    """

    def __init__(self) -> None:
        self._terminal_settings = termios.tcgetattr(0) if os.isatty(0) else None

    def __call__(self, signal_number: int, reason: str = INTERRUPTED) -> NoReturn:
        try:
            with suppress(OSError, ValueError, termios.error):
                self._restore_terminal()
                line = f"entrepot: {reason}\n".encode()
                # A write to a full pipe would block, so this prints nothing if stderr is not ready for a write.
                if select.select([], [2], [], 0)[1]:
                    os.write(2, _SHOW_CURSOR_AND_END_LINE + line if os.isatty(2) else line)
        finally:
            os._exit(128 + signal_number)

    def _restore_terminal(self) -> None:
        """Restores the saved terminal settings. Does nothing in a background process: the kernel would stop a
        background process that changes the terminal."""
        if self._terminal_settings is not None and os.tcgetpgrp(0) == os.getpgrp():
            termios.tcsetattr(0, termios.TCSANOW, self._terminal_settings)


def exit_on_interrupt() -> None:
    """Makes SIGINT end this process immediately, with a line on stderr. SIGTERM keeps its default action, which ends
    the process without a line. Must be called in the main thread, before slow imports.

    SIGINT also ends a process that was started with SIGINT ignored. A shell without job control starts background
    commands in this way. The function unblocks SIGINT and SIGTERM, which a parent process may have blocked.
    """
    exit_now = SignalExit()

    def on_signal(signal_number: int, _: FrameType | None) -> None:
        exit_now(signal_number)

    signal.signal(signal.SIGINT, on_signal)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def run_interruptible(work: Coroutine[Any, Any, T], reason: str = INTERRUPTED) -> T:
    """Runs the coroutine `work` in a new event loop and returns its result. Must be called in the main thread.

    The first SIGINT or SIGTERM cancels `work`. When `work` has ended, or at the latest after CLEANUP_SECONDS, the
    process prints `reason` on stderr and ends with the exit code 128 + the signal's number. A second signal ends the
    process immediately. If `work` returns a result in spite of the cancellation, the process does not end, and this
    function returns the result.
    """
    import asyncio

    runner = asyncio.Runner()
    loop = runner.get_loop()
    task = loop.create_task(work)
    with _SignalWatch(loop, task.cancel, reason) as watch, runner:
        try:
            return loop.run_until_complete(task)
        except BaseException:
            if watch.first_signal is not None:
                # Ends the process here. Closing the loop or exiting normally would wait for the threads, and a thread
                # may be waiting for the network.
                watch.exit_now(watch.first_signal, reason)
            raise


class _SignalWatch:
    """Context manager that handles SIGINT and SIGTERM in a separate thread, the *signal thread*, so that a busy main
    thread does not delay the reaction. The interpreter writes each signal's number into a pipe (`signal.set_wakeup_fd`)
    without waiting for the main thread, and the signal thread reads the pipe.

    After the first signal, the signal thread calls `cancel` in `loop`. After a second signal, or if the `with`
    block still runs CLEANUP_SECONDS after the first signal, the signal thread prints `reason` and ends the process."""

    def __init__(self, loop: asyncio.AbstractEventLoop, cancel: Callable[[], object], reason: str) -> None:
        self.first_signal: int | None = None
        """The number of the first signal; None: there was no signal yet."""
        self.exit_now = SignalExit()
        self._loop = loop
        self._cancel = cancel
        self._reason = reason

    def __enter__(self) -> _SignalWatch:
        import threading

        self._read_fd, self._write_fd = os.pipe()
        os.set_blocking(self._write_fd, False)
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()
        self._previous_wakeup_fd = signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        # These handlers do nothing. They replace the earlier ones, so that only the signal thread reacts to a signal.
        self._previous_handlers = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_wakeup_fd)
        os.close(self._write_fd)  # so that the signal thread reads the end of the pipe and ends
        self._thread.join()
        os.close(self._read_fd)

    def _watch(self) -> None:
        """Handles the first and the second signal. Runs in the signal thread."""
        first_signal = self._wait_for_signal(timeout_seconds=None)
        if first_signal is None:
            return
        self.first_signal = first_signal
        with suppress(RuntimeError):  # the loop is closed if the work has ended in the meantime
            self._loop.call_soon_threadsafe(self._cancel)
        second_signal = self._wait_for_signal(timeout_seconds=CLEANUP_SECONDS)
        if second_signal is not None:
            self.exit_now(second_signal, self._reason)

    def _wait_for_signal(self, timeout_seconds: float | None) -> int | None:
        """Waits for the next signal and returns its number. Returns None if the `with` block ends first. If neither
        happens within `timeout_seconds`, ends the process with the exit code of the first signal. `timeout_seconds`
        None: no time limit."""
        while True:
            if not select.select([self._read_fd], [], [], timeout_seconds)[0]:
                assert self.first_signal is not None
                self.exit_now(self.first_signal, self._reason)
            data = os.read(self._read_fd, 1)
            if not data:
                return None
            if data[0] in _SIGNALS:
                return data[0]
