"""The memory budget for responses that clients have not received yet. All connections share it."""

from __future__ import annotations

import asyncio

from registry.server.connection.unsent_budget import UnsentBudget, UnsentShare
from registry.server.gate.connection_limit import EvictionCandidate, SilentConnectionKind

LIMIT = 100
"""The budget in bytes."""


class BufferedTransport(asyncio.Transport):
    """A transport that reports `held` bytes in its write buffer. `looks`: how often it was asked for them."""

    def __init__(self) -> None:
        super().__init__()
        self.held = 0
        self.looks = 0

    def get_write_buffer_size(self) -> int:
        self.looks += 1
        return self.held


class Client:
    """A connection with a share of the budget, whose client receives nothing until a test sets `held` to 0."""

    def __init__(self, budget: UnsentBudget, kind: SilentConnectionKind | None = None) -> None:
        self.kind = kind
        self.transport = BufferedTransport()
        self.share = UnsentShare(budget, self, self.transport, is_tls=False)

    async def send(self, size: int, *, finish: bool = True, body_bytes: int = 0) -> bool:
        """Sends a response of `size` bytes, if the budget allows it. Returns whether it was sent. Without `finish`, the
        response goes on: these were the bytes of its first slice. `body_bytes`: the size of all its slices, if there
        are more."""
        is_reserved = await self.share.reserve(size, body_bytes or size)
        self.transport.held += size if is_reserved else 0
        if finish:
            self.share.finish()
        return is_reserved

    def eviction_candidate(self, now: float) -> EvictionCandidate | None:
        return None if self.kind is None else EvictionCandidate(self.kind, now, None)

    def evict(self) -> None:
        self.transport.held = 0
        self.share.close()


def new_budget(wait_seconds: float = 0.01) -> UnsentBudget:
    return UnsentBudget(LIMIT, wait_seconds, lambda: 0.0)


async def test_responses_fit_up_to_the_limit() -> None:
    """Responses can be sent until the unsent bytes of all connections reach the limit."""
    budget = new_budget()
    assert await Client(budget).send(60)
    assert await Client(budget).send(40)
    assert not await Client(budget).send(1)


async def test_sent_bytes_no_longer_count() -> None:
    """The bytes of a response no longer count when the transport has sent all of them, or when the connection releases
    its share of the budget."""
    budget = new_budget()
    first, second = Client(budget), Client(budget)
    assert await first.send(100)
    first.transport.held = 0
    assert await second.send(100)
    second.share.release_if_sent()
    assert not await first.send(1)
    second.share.release()
    assert await first.send(100)


async def test_connections_of_stalled_clients_are_closed() -> None:
    """If the budget is used up, connections that have stalled are closed. Connections that are only slow stay open."""
    budget = new_budget()
    stalled, slow = Client(budget, "stalled"), Client(budget, "idle")
    assert await stalled.send(50)
    assert await slow.send(50)
    assert await Client(budget).send(50)
    assert (stalled.transport.held, slow.transport.held) == (0, 50)


async def test_a_lost_connection_uses_no_budget() -> None:
    """When a connection is lost, its share of the budget is released. After that, the share never closes the
    connection."""
    budget = new_budget()
    client = Client(budget, "stalled")
    assert await client.send(100)
    client.share.close()
    client.share.evict_if_stalled(0.0)
    assert client.transport.held == 100
    assert await Client(budget).send(100)


async def test_the_work_for_a_response_does_not_grow_with_the_number_of_connections() -> None:
    """2,000 open connections have received a large response each. A further response looks at a few connections only,
    those whose bytes have to leave the budget, and finds its room."""
    budget = new_budget()
    idle = [Client(budget) for _ in range(2000)]
    for client in idle:
        assert await client.send(10)
        client.transport.held = 0
    looks_before = sum(client.transport.looks for client in idle)
    for _ in range(100):
        assert await Client(budget).send(1)
    looks = sum(client.transport.looks for client in idle) - looks_before
    assert looks_before <= 2 * len(idle)
    assert looks <= 2 * 100


async def test_a_slow_client_does_not_hide_sent_bytes() -> None:
    """The connection that reserved first still has unsent bytes. Those that reserved later have sent theirs, so a
    response finds its room, and the unsent bytes still count."""
    budget = new_budget()
    slow, *others = [Client(budget) for _ in range(4)]
    for client in (slow, *others):
        assert await client.send(25)
    for client in others:
        client.transport.held = 0
    assert await Client(budget).send(75)
    assert not await Client(budget).send(1)


async def test_a_second_response_of_a_connection_replaces_its_share() -> None:
    """A connection that sends a second response has one share, of the size of the second response. After it is
    released, all of the budget is free."""
    budget = new_budget()
    client = Client(budget)
    assert await client.send(60)
    assert await client.send(40)
    assert not await Client(budget).send(61)
    assert await Client(budget).send(60)
    client.share.close()
    assert await Client(budget).send(40)


async def test_a_response_counts_while_it_is_written() -> None:
    """The transport has sent all bytes of the first slice, and the response has more slices. The slice still counts
    until the response is complete, so later slices cannot exceed the limit."""
    budget = new_budget()
    client = Client(budget)
    assert await client.send(100, finish=False)
    client.transport.held = 0
    assert not await Client(budget).send(1)
    client.share.finish()
    assert await Client(budget).send(1)


async def test_responses_wait_in_the_order_of_arrival() -> None:
    """The budget is used up. Responses wait, and get their room in the order of arrival, a small one behind a large
    one as well."""
    budget = new_budget(wait_seconds=10)
    first, large, small = [Client(budget) for _ in range(3)]
    assert await first.send(100, finish=False)
    tasks = [asyncio.create_task(large.send(100, finish=False)), asyncio.create_task(small.send(1))]
    await asyncio.sleep(0)
    first.share.release()
    assert await tasks[0]
    assert not tasks[1].done()
    large.share.release()
    assert await tasks[1]


async def test_a_waiting_response_notices_sent_bytes() -> None:
    """A response waits. Nothing tells the budget that the bytes of another one were sent, so the budget looks again and
    again."""
    budget = new_budget(wait_seconds=10)
    client, other = Client(budget), Client(budget)
    assert await client.send(100)
    waiting = asyncio.create_task(other.send(100))
    await asyncio.sleep(0)
    client.transport.held = 0
    assert await waiting


async def test_a_refused_response_no_longer_blocks_the_next() -> None:
    """A large response waits for too long, or its wait is cancelled. The small response behind it then gets its room,
    and nothing stays reserved for the large one."""
    for is_cancelled in (False, True):
        budget = new_budget(wait_seconds=10 if is_cancelled else 0.05)
        holder, large, small = [Client(budget) for _ in range(3)]
        assert await holder.send(60)
        refused = asyncio.create_task(large.send(100))
        await asyncio.sleep(0)  # the large response begins to wait
        budget._wait_seconds = 10  # a machine that stalls must not end the wait of the small one
        waiting = asyncio.create_task(small.send(40))
        await asyncio.sleep(0)
        if is_cancelled:
            refused.cancel()
            await asyncio.wait([refused])
            assert refused.cancelled()
        else:
            assert not await refused
        assert (large.share.reserved_bytes, small.share.reserved_bytes) == (0, 40)  # no search was needed
        assert await waiting


async def test_a_lost_connection_stops_waiting() -> None:
    """A connection is lost while its response waits. The wait ends at once without room, so that the memory of the
    response can be freed, and the next response gets the room later. The bytes of an earlier response of the lost
    connection are released."""
    budget = new_budget(wait_seconds=10)
    holder, lost, other = [Client(budget) for _ in range(3)]
    assert await holder.send(60, finish=False)
    assert await lost.send(40)
    refused, waiting = asyncio.create_task(lost.send(100)), asyncio.create_task(other.send(100))
    await asyncio.sleep(0)
    lost.share.close()
    assert not await refused
    assert lost.share.reserved_bytes == 0
    assert not waiting.done()
    holder.share.release()
    assert await waiting


async def test_only_some_responses_wait() -> None:
    """The bodies of the responses that wait may have twice the size of the budget together, because they are in memory.
    Further responses are refused at once."""
    budget = new_budget(wait_seconds=10)
    holder = Client(budget)
    assert await holder.send(100, finish=False)
    clients = [Client(budget) for _ in range(4)]
    tasks = [asyncio.create_task(client.send(50, finish=False)) for client in clients]
    await asyncio.sleep(0)
    assert not await Client(budget).send(1)
    assert [task.done() for task in tasks] == [False] * 4
    clients[0].share.close()
    late = asyncio.create_task(Client(budget).send(50))
    holder.share.release()
    assert [await task for task in tasks[:3]] == [False, True, True]
    for client in clients[1:]:
        client.share.release()
    assert [await task for task in (tasks[3], late)] == [True, True]


async def test_one_very_large_response_waits() -> None:
    """A response waits if no other does, however large it is."""
    budget = new_budget(wait_seconds=10)
    holder, very_large, other = [Client(budget) for _ in range(3)]
    assert await holder.send(100, finish=False)
    waiting = asyncio.create_task(very_large.send(50, body_bytes=500, finish=False))
    await asyncio.sleep(0)
    assert not await other.send(1)
    holder.share.release()
    assert await waiting
