"""How SIGINT (Ctrl-C) and SIGTERM end a command.

Python's KeyboardInterrupt is not enough: libraries catch it, threads that wait for the network never see it, and the
interpreter joins such threads before it exits. Ending a command abruptly loses nothing: what storage has acknowledged
is durable, and the next run removes the rest.

Once it has loaded, `entrepot serve` handles its signals itself (`registry.server`).
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
CLEANUP_SECONDS = 3.0
"""Seconds that a command gets to clean up after the first signal."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_NEW_LINE = b"\x1b[?25h\n"
"""Shows the cursor, which progress bars hide, and ends the line in which the terminal shows ^C."""


class SignalExit:
    """Ends the process at once, from any thread, with exit code 128 + the signal's number and one line on stderr.

    Restores the state that the terminal had when the object was made: make it before the command changes the terminal.
    """

    def __init__(self) -> None:
        self._attributes = termios.tcgetattr(0) if os.isatty(0) else None

    def __call__(self, number: int, reason: str = INTERRUPTED) -> NoReturn:
        try:
            with suppress(OSError, ValueError, termios.error):
                self._restore_terminal()
                line = f"entrepot: {reason}\n".encode()
                if select.select([], [2], [], 0)[1]:  # a full pipe must not hold up the exit
                    os.write(2, _NEW_LINE + line if os.isatty(2) else line)
        finally:
            os._exit(128 + number)

    def _restore_terminal(self) -> None:
        """Turns the echo on again after a password prompt. Does nothing in the background, where changing the terminal
        would stop the process."""
        if self._attributes is not None and os.tcgetpgrp(0) == os.getpgrp():
            termios.tcsetattr(0, termios.TCSANOW, self._attributes)


def exit_on_interrupt() -> None:
    """Makes SIGINT end this process at once. Must be called in the main thread, before slow imports.

    A shell without job control starts background commands with SIGINT ignored, and Python keeps that. A command that
    waits for the network must still end when it receives one.
    """
    exit_now = SignalExit()

    def on_signal(number: int, _: FrameType | None) -> None:
        exit_now(number)

    signal.signal(signal.SIGINT, on_signal)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def run_interruptible(work: Coroutine[Any, Any, T], reason: str = INTERRUPTED) -> T:
    """Runs `work` in its own event loop, in the main thread, and returns its result.

    The first SIGINT or SIGTERM cancels `work`. When it has cleaned up, at the latest after CLEANUP_SECONDS, the process
    ends with exit code 128 + the signal's number and `reason` on stderr. A second signal ends the process at once. When
    `work` succeeds in spite of the signal, its result is returned as usual.
    """
    import asyncio

    runner = asyncio.Runner()
    loop = runner.get_loop()
    task = loop.create_task(work)
    with _SignalWatch(loop, task.cancel, reason) as watch, runner:
        try:
            return loop.run_until_complete(task)
        except BaseException:
            if watch.number is not None:
                # Exit here: on a return, the loop and the interpreter would join threads that may wait for the network.
                watch.exit_now(watch.number, reason)
            raise


class _SignalWatch:
    """Watches for signals in a thread of its own, so that a busy main thread does not delay them. The interpreter
    writes each signal's number into a pipe (`signal.set_wakeup_fd`) without waiting for the main thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, cancel: Callable[[], object], reason: str) -> None:
        self.number: int | None = None
        """The number of the first signal; None before one has come."""
        self.exit_now = SignalExit()
        self._loop = loop
        self._cancel = cancel
        self._reason = reason

    def __enter__(self) -> _SignalWatch:
        import threading

        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._writer)
        self._thread.join()
        os.close(self._reader)

    def _watch(self) -> None:
        number = self._next(None)
        if number is None:
            return
        self.number = number
        with suppress(RuntimeError):  # the loop is closed: the work has ended
            self._loop.call_soon_threadsafe(self._cancel)
        second = self._next(CLEANUP_SECONDS)
        if second is not None:
            self.exit_now(second, self._reason)

    def _next(self, seconds: float | None) -> int | None:
        """Waits for the next signal and returns its number, or None when the watch is over. Ends the process when
        `seconds` have passed without one."""
        while True:
            if not select.select([self._reader], [], [], seconds)[0]:
                assert self.number is not None
                self.exit_now(self.number, self._reason)
            data = os.read(self._reader, 1)
            if not data:
                return None
            if data[0] in _SIGNALS:
                return data[0]
