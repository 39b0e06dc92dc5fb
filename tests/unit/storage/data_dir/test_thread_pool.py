"""A thread pool works with the threads that it has if the operating system refuses further ones."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import wait

import pytest

from storage.data_dir.blocking_calls import ThreadPool, run_in_thread


@pytest.fixture
def pool() -> Iterator[ThreadPool]:
    with ThreadPool(4) as pool:
        yield pool


@pytest.fixture
def release(pool: ThreadPool) -> Iterator[threading.Event]:
    """Ends the call that occupies the only thread of the pool."""
    release = threading.Event()
    pool.submit(release.wait)
    yield release
    release.set()


def refuse_threads(patch: pytest.MonkeyPatch) -> None:
    """Makes each further start of a thread fail, as at the limit of a container or of a systemd unit."""

    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    patch.setattr(threading.Thread, "start", start)


def test_a_call_waits_for_a_running_thread(
    pool: ThreadPool, release: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If no further thread can be started, a running thread makes the call as soon as it is free."""
    refuse_threads(monkeypatch)
    calls = [pool.submit(int, number) for number in ("1", "2", "3")]
    release.set()
    assert [call.result(5) for call in calls] == [1, 2, 3]


def test_a_call_of_a_task_waits_for_a_running_thread(
    pool: ThreadPool, release: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task gets the result of its blocking call although no further thread can be started."""
    refuse_threads(monkeypatch)

    async def call() -> str:
        result = run_in_thread(pool, lambda: "result")
        release.set()
        async with asyncio.timeout(5):
            return await result

    assert asyncio.run(call()) == "result"


def test_a_call_that_was_refused_is_never_made(pool: ThreadPool) -> None:
    """If the first thread cannot be started, the call is refused, and is not made when threads can be started again."""
    made: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        refuse_threads(patch)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            pool.submit(made.append, "refused")
    wait([pool.submit(made.append, "accepted")], 5)
    assert made == ["accepted"]
