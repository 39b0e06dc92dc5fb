"""`SingleFlight` runs work for a key in one task. All callers with the same key get the result of this task, which does
not end if a caller is cancelled. If all callers have left, a task that still waits to send its request is given up."""

from __future__ import annotations

import asyncio
import threading

import pytest

from registry.request import NO_REQUEST, RequestContext, current_request, enter_request
from registry.single_flight import SingleFlight, finish_in_thread, note_sending, waiting_to_send
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


class QueuedWork(GatedWork):
    """Work that sends a request. It sets `begun` when it starts, waits for `turn` before it sends the request, and for
    `gate` until it has the response. `sent` is the number of requests, `given_up` the number of ended waits."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = asyncio.Event()
        self.sent = self.given_up = 0
        self.unwinding: asyncio.Event | None = None
        """If it is set, work that is given up waits for this event before it ends."""

    async def __call__(self) -> int:
        self.runs += 1
        self.begun.set()
        try:
            with waiting_to_send():
                await self.turn.wait()
        except asyncio.CancelledError:
            self.given_up += 1
            if self.unwinding is not None:
                await self.unwinding.wait()
            raise
        note_sending()
        self.sent += 1
        with waiting_to_send():
            await self.gate.wait()
        return self.runs


async def leave(*callers: asyncio.Task[int]) -> None:
    """Cancels the callers, and lets the other tasks run."""
    for caller in callers:
        caller.cancel()
    ends = await asyncio.gather(*callers, return_exceptions=True)
    assert all(isinstance(end, asyncio.CancelledError) for end in ends)
    for _ in range(5):
        await asyncio.sleep(0)


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


async def test_a_task_that_waits_to_send_is_given_up_without_callers() -> None:
    """If all callers have left before the task could send its request, the task ends without sending it. A later caller
    gets the result of a new task."""
    flights, work = SingleFlight[int](), QueuedWork()
    callers = [asyncio.create_task(flights.run("a", work)) for _ in range(3)]
    await work.begun.wait()
    await leave(*callers[:2])
    assert len(flights) == 1
    await leave(callers[2])
    assert (len(flights), work.given_up) == (0, 1)
    work.turn.set()
    work.gate.set()
    assert await flights.run("a", work) == 2
    assert work.sent == 1


async def test_a_task_that_waits_to_send_continues_for_the_remaining_callers() -> None:
    """If the caller that has started the task leaves while the task waits to send its request, another caller gets the
    result."""
    flights, work = SingleFlight[int](), QueuedWork()
    first, second = (asyncio.create_task(flights.run("a", work)) for _ in range(2))
    await work.begun.wait()
    await leave(first)
    work.turn.set()
    work.gate.set()
    assert await second == 1


async def test_a_task_whose_callers_have_left_does_not_begin_to_wait() -> None:
    """If all callers have left before the task begins to wait until it can send its request, the task ends as soon as
    it would wait."""
    flights, work, start = SingleFlight[int](), QueuedWork(), asyncio.Event()

    async def work_later() -> int:
        await start.wait()
        return await work()

    caller = asyncio.create_task(flights.run("a", work_later))
    await asyncio.sleep(0)
    await leave(caller)
    assert len(flights) == 1
    start.set()
    await leave()
    assert (len(flights), work.given_up) == (0, 1)


async def test_a_task_that_has_sent_its_request_continues() -> None:
    """If all callers leave after the task has sent its first request, the task continues, even if it waits to send
    another request. The next caller gets its result."""
    flights, work = SingleFlight[int](), QueuedWork()
    work.turn.set()
    caller = asyncio.create_task(flights.run("a", work))
    await work.begun.wait()
    await leave(caller)
    assert len(flights) == 1
    later_caller = asyncio.create_task(flights.run("a", work))
    await asyncio.sleep(0)
    work.gate.set()
    assert await later_caller == 1


async def test_a_task_that_waits_for_another_task_is_given_up_with_it() -> None:
    """If a task needs the result of another one, such as a token, and all its callers leave before it has sent its own
    request, it ends. The other task ends as well if it waits in a queue and nobody else needs its result."""
    flights, tokens, work = SingleFlight[int](), SingleFlight[int](), QueuedWork()
    callers = [asyncio.create_task(flights.run(key, lambda: tokens.run("token", work))) for key in ("a", "b")]
    await work.begun.wait()
    await leave(callers[0])
    assert (len(flights), len(tokens), work.given_up) == (1, 1, 0)
    await leave(callers[1])
    assert (len(flights), len(tokens), work.given_up) == (0, 0, 1)


async def test_a_token_request_that_was_sent_continues() -> None:
    """If the other task has sent its request, it continues, and a later caller uses its result."""
    flights, tokens, work = SingleFlight[int](), SingleFlight[int](), QueuedWork()
    work.turn.set()
    caller = asyncio.create_task(flights.run("a", lambda: tokens.run("token", work)))
    await work.begun.wait()
    await leave(caller)
    assert (len(flights), len(tokens)) == (0, 1)
    later_caller = asyncio.create_task(flights.run("a", lambda: tokens.run("token", work)))
    await asyncio.sleep(0)
    work.gate.set()
    assert await later_caller == work.sent == 1


async def test_a_task_without_callers_by_design_is_not_given_up() -> None:
    """A task that `start` has started, or has returned, waits to send its request although it has no callers."""
    flights, work = SingleFlight[int](), QueuedWork()
    caller = asyncio.create_task(flights.run("a", work))
    await work.begun.wait()
    task = flights.start("a", work)
    other_task = flights.start("b", work)
    await leave(caller)
    assert len(flights) == 2
    work.turn.set()
    work.gate.set()
    assert await task == await other_task == 2  # both return the number of runs


async def test_a_new_caller_never_gets_the_cancellation_of_an_earlier_one() -> None:
    """A caller that arrives while a task without callers is being given up gets the result of a new task."""
    flights, work = SingleFlight[int](), QueuedWork()
    work.unwinding = asyncio.Event()
    first = asyncio.create_task(flights.run("a", work))
    await work.begun.wait()
    first.cancel()
    second = asyncio.create_task(flights.run("a", work))
    await leave(first)
    assert not second.done()
    await leave(second)
    assert len(flights) == 0
    assert work.given_up > 0
    last = [asyncio.create_task(flights.run("a", work)) for _ in range(2)]
    work.turn.set()
    work.gate.set()
    assert len(set(await asyncio.gather(*last))) == 1
    assert work.sent == 1
    work.unwinding.set()
    await flights.aclose()


async def test_close_waits_for_tasks_that_are_being_given_up() -> None:
    """`aclose` returns after the tasks have ended that were given up because their callers have left."""
    flights, work = SingleFlight[int](), QueuedWork()
    work.unwinding = asyncio.Event()
    caller = asyncio.create_task(flights.run("a", work))
    await work.begun.wait()
    await leave(caller)
    assert work.given_up == 1
    closing = asyncio.create_task(flights.aclose())
    await asyncio.sleep(0)
    await closing
    assert not [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]


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
