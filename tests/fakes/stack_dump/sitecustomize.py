"""Loaded by a command that a test starts, before anything else: on SIGUSR1 it shows what its tasks wait for, and when
SIGABRT ends it, where its threads are. Both go to stderr."""

from __future__ import annotations

import asyncio
import faulthandler
import signal
import sys


def show_tasks(*_: object) -> None:
    """In the main thread, between two steps of the event loop or while it waits."""
    loop = asyncio._get_running_loop()
    for task in asyncio.all_tasks(loop) if loop else ():
        print(f"{task!r} cancelling={task.cancelling()}", file=sys.stderr)
        task.print_stack(file=sys.stderr)
    sys.stderr.flush()


faulthandler.enable()
signal.signal(signal.SIGUSR1, show_tasks)
