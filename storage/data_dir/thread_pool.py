"""A thread pool that keeps working if the operating system refuses further threads (`ThreadPool`)."""

from __future__ import annotations

import queue
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress


class ThreadPool(ThreadPoolExecutor):
    """A ThreadPoolExecutor for machines that limit the number of threads, as `docker run --pids-limit` and `TasksMax`
    of systemd do.

    `ThreadPoolExecutor.submit` first puts the call into its queue, and then starts a thread. If it cannot start one, it
    raises RuntimeError although the call is in the queue. So a running thread makes the call later, and nobody gets
    its result, such as the open file that it returns. Here, the call waits for a running thread, and `submit` does not
    raise. If no thread is running, `submit` raises RuntimeError, and the call is never made."""

    def _adjust_thread_count(self) -> None:
        """`submit` calls this when the call is in the queue, with the pool's lock held."""
        try:
            super()._adjust_thread_count()
        except RuntimeError:
            if self._threads:
                return
            with suppress(queue.Empty):
                while True:
                    self._work_queue.get_nowait()
            raise
