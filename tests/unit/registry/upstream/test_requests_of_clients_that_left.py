"""Requests to an upstream that have not been sent yet are dropped when their clients have left, so that they do not
make the requests of other clients wait."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from registry.single_flight import SingleFlight, note_sending
from registry.upstream.list_cache import MAX_CONCURRENT_LISTS, CompleteList, ListCache
from registry.upstream.request_limits import KeyedSemaphore


async def leave(*clients: asyncio.Task[Any]) -> None:
    """Cancels the clients, and lets the other tasks run."""
    for client in clients:
        client.cancel()
    await asyncio.gather(*clients, return_exceptions=True)
    await run_other_tasks()


async def run_other_tasks() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


class Upstream:
    """Reads lists. Each read waits until `may_answer` is set. `requested` has the keys of the lists, in the order in
    which they were requested."""

    def __init__(self) -> None:
        self.requested: list[str] = []
        self.may_answer = asyncio.Event()

    def reader(self, key: str) -> Callable[[], Coroutine[Any, Any, CompleteList[str]]]:
        async def read() -> CompleteList[str]:
            note_sending()
            self.requested.append(key)
            await self.may_answer.wait()
            return CompleteList([key], 1, 10)

        return read


def request_list(cache: ListCache[str], upstream: Upstream, key: str) -> asyncio.Task[Any]:
    return asyncio.create_task(cache.get(key, upstream.reader(key), is_first_page=True))


async def test_lists_of_clients_that_left_are_not_read() -> None:
    """Clients that request many lists and leave at once do not delay a client that stays: only the lists that are read
    already when their clients leave are read to the end."""
    cache, upstream = ListCache[str]("far.test"), Upstream()
    leaving = [request_list(cache, upstream, f"left{number}") for number in range(5 * MAX_CONCURRENT_LISTS)]
    await run_other_tasks()
    staying = request_list(cache, upstream, "stays")
    await run_other_tasks()
    await leave(*leaving)
    upstream.may_answer.set()
    assert await staying == ["stays"]
    await run_other_tasks()
    assert upstream.requested == [*(f"left{number}" for number in range(MAX_CONCURRENT_LISTS)), "stays"]
    await cache.aclose()


async def test_a_list_that_two_clients_wait_for_is_read_for_the_one_that_stays() -> None:
    """If one of two clients leaves while their list waits to be read, the other one gets the list."""
    cache, upstream = ListCache[str]("far.test"), Upstream()
    busy = [request_list(cache, upstream, f"busy{number}") for number in range(MAX_CONCURRENT_LISTS)]
    await run_other_tasks()
    leaving, staying = (request_list(cache, upstream, "shared") for _ in range(2))
    await run_other_tasks()
    await leave(leaving)
    upstream.may_answer.set()
    assert await staying == ["shared"]
    await asyncio.gather(*busy)
    await cache.aclose()


async def test_a_list_that_was_requested_is_read_without_clients() -> None:
    """If the clients leave while their list is read, the next client gets the list without another request."""
    cache, upstream = ListCache[str]("far.test"), Upstream()
    client = request_list(cache, upstream, "list")
    await run_other_tasks()
    await leave(client)
    next_client = request_list(cache, upstream, "list")
    await run_other_tasks()
    upstream.may_answer.set()
    assert await next_client == ["list"]
    assert upstream.requested == ["list"]
    await cache.aclose()


async def test_requests_of_clients_that_left_do_not_wait_for_the_slots_of_a_key() -> None:
    """A shared task that waits for a slot of a KeyedSemaphore ends when its callers have left. The slot goes to the
    next task in the queue."""
    limit, flights = KeyedSemaphore(1), SingleFlight[str]()
    may_end, order = asyncio.Event(), list[str]()

    async def use(name: str) -> str:
        async with limit.acquire("key"):
            note_sending()
            order.append(name)
            await may_end.wait()
        return name

    async def call(name: str) -> str:
        return await flights.run(name, lambda: use(name))

    callers = {name: asyncio.create_task(call(name)) for name in ("first", "leaves", "leaves too", "stays")}
    await run_other_tasks()
    await leave(callers["leaves"], callers["leaves too"])
    assert len(flights) == 2
    may_end.set()
    assert (await callers["first"], await callers["stays"]) == ("first", "stays")
    assert order == ["first", "stays"]


async def test_a_task_that_is_no_shared_task_waits_for_its_slot() -> None:
    """A task that does not belong to a SingleFlight waits for a slot, and gives it back if it is cancelled."""
    limit, may_end = KeyedSemaphore(1), asyncio.Event()

    async def use() -> bool:
        async with limit.acquire("key"):
            return await may_end.wait()

    tasks = [asyncio.create_task(use()) for _ in range(3)]
    await run_other_tasks()
    await leave(tasks[0])
    may_end.set()
    assert await asyncio.gather(*tasks[1:]) == [True, True]
