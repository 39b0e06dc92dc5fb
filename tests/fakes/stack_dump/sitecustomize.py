"""A command that a test starts loads this module first. On SIGUSR1, it shows what the tasks of the command wait for.
When SIGABRT ends it, it shows where its threads are. Both outputs go to stderr."""

from __future__ import annotations

import asyncio
import faulthandler
import signal
import sys


def show_tasks(*_: object) -> None:
    """Runs in the main thread, between two steps of the event loop or while it waits."""
    loop = asyncio._get_running_loop()
    for task in asyncio.all_tasks(loop) if loop else ():
        print(f"{task!r} cancelling={task.cancelling()}", file=sys.stderr)
        task.print_stack(file=sys.stderr)
    sys.stderr.flush()


faulthandler.enable()
signal.signal(signal.SIGUSR1, show_tasks)
