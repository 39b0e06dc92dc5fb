"""How SIGINT (Ctrl-C) and SIGTERM end a command.

A command cannot leave this to Python's KeyboardInterrupt: libraries catch it, a thread that waits for the network does
not see it, and the interpreter joins such threads before it exits. Nor is an interrupted command allowed to lose
anything by ending abruptly: what storage acknowledged is durable, and the rest is garbage that the next run removes.

`entrepot serve` handles its signals itself (`registry.server`) once it has loaded.
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
"""Seconds that a command has to clean up after the first signal."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_NEW_LINE = b"\x1b[?25h\n"
"""For a terminal: progress bars hide the cursor, and the ^C that it shows ends no line."""


class SignalExit:
    """Ends the process at once from any thread, with the exit code 128 + the signal's number and one line on stderr.
    Made before the command changes the terminal, whose state it restores."""

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
        """A password prompt turns the echo off. From the background, setting it would stop the process."""
        if self._attributes is not None and os.tcgetpgrp(0) == os.getpgrp():
            termios.tcsetattr(0, termios.TCSANOW, self._attributes)


def exit_on_interrupt() -> None:
    """From now on SIGINT ends this process at once. To be called in the main thread, before anything slow is imported.

    A shell without job control starts background commands with SIGINT ignored, and Python leaves that as it is. A
    command that waits for a network must end all the same when it is sent one.
    """
    leave = SignalExit()

    def on_signal(number: int, _: FrameType | None) -> None:
        leave(number)

    signal.signal(signal.SIGINT, on_signal)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def run_interruptible(work: Coroutine[Any, Any, T], reason: str = INTERRUPTED) -> T:
    """What `work` gives, run in an event loop of its own, in the main thread.

    The first SIGINT or SIGTERM cancels it; once it has cleaned up, or after GRACE seconds, the process ends with
    128 + the signal's number and `reason` on stderr. A second one ends the process at once. `work` that ends well all
    the same counts as done.
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
                # Without a return: the loop and the interpreter would join threads that may wait for the network.
                watch.leave(watch.number, reason)
            raise


class _SignalWatch:
    """A thread that hears of signals, whatever the main thread is busy with. The interpreter's own signal handler
    writes each signal's number into a pipe (`signal.set_wakeup_fd`), without waiting for the main thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, cancel: Callable[[], object], reason: str) -> None:
        self.number: int | None = None
        """The first signal."""
        self.leave = SignalExit()
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
            self.leave(second, self._reason)

    def _next(self, seconds: float | None) -> int | None:
        """The next signal. None: the watch is over. After `seconds` the process ends."""
        while True:
            if not select.select([self._reader], [], [], seconds)[0]:
                assert self.number is not None
                self.leave(self.number, self._reason)
            data = os.read(self._reader, 1)
            if not data:
                return None
            if data[0] in _SIGNALS:
                return data[0]
