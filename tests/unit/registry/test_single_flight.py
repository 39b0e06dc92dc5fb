"""`SingleFlight` runs work for a key in one task. All callers with the same key get the result of this task, which does
not end if a caller is cancelled."""

from __future__ import annotations

import asyncio
import threading

import pytest

from registry.request import NO_REQUEST, RequestContext, current_request, enter_request
from registry.single_flight import SingleFlight, finish_in_thread
from storage.errors import UpstreamUnavailable


class GatedWork:
    """Work that counts its runs, sets `begun` when it starts, and ends when `gate` is set."""

    def __init__(self, error: Exception | None = None) -> None:
        self.begun, self.gate = asyncio.Event(), asyncio.Event()
        self.runs = 0
        self._error = error

    async def __call__(self) -> int:
        self.runs += 1
        self.begun.set()
        await self.gate.wait()
        if self._error is not None:
            raise self._error
        return self.runs


async def test_callers_with_one_key_share_a_task() -> None:
    """Concurrent callers with the same key get the result of one run. A caller after the end of this run starts a new
    run."""
    flights, work = SingleFlight[int](), GatedWork()
    callers = [asyncio.create_task(flights.run("a", work)) for _ in range(3)]
    await asyncio.sleep(0)
    assert len(flights) == 1
    work.gate.set()
    assert await asyncio.gather(*callers) == [1, 1, 1]
    assert await flights.run("a", work) == 2
    assert len(flights) == 0


async def test_keys_are_independent() -> None:
    """Work for different keys runs at the same time."""
    flights, first_work, second_work = SingleFlight[int](), GatedWork(), GatedWork()
    callers = [asyncio.create_task(flights.run(key, work)) for key, work in (("a", first_work), ("b", second_work))]
    await asyncio.sleep(0)
    assert len(flights) == 2
    first_work.gate.set()
    second_work.gate.set()
    assert await asyncio.gather(*callers) == [1, 1]


async def test_an_error_reaches_every_caller() -> None:
    """All callers of `run` get the error of the work. `settle`, which only waits for the end, raises no error."""
    flights, work = SingleFlight[int](), GatedWork(ValueError("no"))
    callers = [asyncio.create_task(flights.run("a", work)) for _ in range(2)]
    settled = asyncio.create_task(flights.settle("a", work))
    await asyncio.sleep(0)
    work.gate.set()
    assert [str(error) for error in await asyncio.gather(*callers, return_exceptions=True)] == ["no", "no"]
    await settled
    assert work.runs == 1


async def test_a_cancelled_caller_leaves_the_task_running() -> None:
    """If the caller that has started the task is cancelled, the other callers still get the result."""
    flights, work = SingleFlight[int](), GatedWork()
    first = asyncio.create_task(flights.run("a", work))
    second = asyncio.create_task(flights.run("a", work))
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    work.gate.set()
    assert await second == 1


async def test_close_cancels_tasks_and_refuses_new_ones() -> None:
    """When `aclose` is called, waiting callers get the error that the server is stopping, and so do later callers.
    `settle` does not raise this error."""
    flights, work = SingleFlight[int](), GatedWork()
    caller = asyncio.create_task(flights.run("a", work))
    settled = asyncio.create_task(flights.settle("a", work))
    await work.begun.wait()
    await flights.aclose()
    with pytest.raises(UpstreamUnavailable, match="the server is stopping"):
        await caller
    await settled
    with pytest.raises(UpstreamUnavailable):
        flights.start("b", work)
    await flights.aclose()
    assert work.runs == 1


async def test_the_error_after_closing_can_be_chosen() -> None:
    """The error after `aclose` can be set, because callers outside the mirror need an error of their own."""
    flights, work = SingleFlight[int](lambda: LookupError("closed")), GatedWork()
    caller = asyncio.create_task(flights.run("a", work))
    await asyncio.sleep(0)
    await flights.aclose()
    with pytest.raises(LookupError, match="closed"):
        await caller
    with pytest.raises(LookupError, match="closed"):
        await flights.run("a", work)


async def test_a_task_does_not_see_the_request_that_starts_it() -> None:
    """The task has no request context, although its caller has one."""

    async def work() -> RequestContext:
        return current_request()

    enter_request(RequestContext())
    assert await SingleFlight[RequestContext]().run("a", work) is NO_REQUEST


async def test_call_in_a_thread_ends_before_its_cancelled_caller() -> None:
    """If the caller of `finish_in_thread` is cancelled, it ends only after the call in the thread has ended."""
    has_begun, may_end = threading.Event(), threading.Event()

    def call() -> bool:
        has_begun.set()
        return may_end.wait(60)

    caller = asyncio.create_task(finish_in_thread(call))
    await asyncio.to_thread(has_begun.wait)
    caller.cancel()
    for _ in range(10):
        await asyncio.sleep(0)
    assert not caller.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert await finish_in_thread(call)
