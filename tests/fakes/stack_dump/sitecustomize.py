"""Commands that tests start load this module first. It prints stacks to stderr: on SIGUSR1 those of all asyncio tasks,
and on SIGABRT, which ends the command, those of all threads."""

from __future__ import annotations

import asyncio
import faulthandler
import signal
import sys


def show_tasks(*_: object) -> None:
    """Prints the stacks of all tasks. Python calls signal handlers in the main thread, between two steps of the event
    loop or while the loop waits."""
    loop = asyncio._get_running_loop()
    for task in asyncio.all_tasks(loop) if loop else ():
        print(f"{task!r} cancelling={task.cancelling()}", file=sys.stderr)
        task.print_stack(file=sys.stderr)
    sys.stderr.flush()


faulthandler.enable()
signal.signal(signal.SIGUSR1, show_tasks)
