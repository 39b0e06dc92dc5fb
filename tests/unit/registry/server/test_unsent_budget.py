"""The memory budget for responses that clients have not received yet. All connections share it."""

from __future__ import annotations

import asyncio

from registry.server.connection.unsent_budget import UnsentBudget, UnsentShare
from registry.server.gate.connection_limit import EvictionCandidate, EvictionKind

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
    """A connection with a share of the budget, whose client receives nothing."""

    def __init__(self, budget: UnsentBudget, kind: EvictionKind | None = None) -> None:
        self.kind = kind
        self.transport = BufferedTransport()
        self.share = UnsentShare(budget, self, self.transport, is_tls=False)

    def send(self, size: int) -> bool:
        """Sends a response of `size` bytes, if the budget allows it. Returns whether it was sent."""
        is_reserved = self.share.reserve(size)
        self.transport.held += size if is_reserved else 0
        return is_reserved

    def eviction_candidate(self, now: float) -> EvictionCandidate | None:
        return None if self.kind is None else EvictionCandidate(self.kind, now, None)

    def evict(self) -> None:
        self.transport.held = 0
        self.share.close()


def new_budget() -> UnsentBudget:
    return UnsentBudget(LIMIT, lambda: 0.0)


def test_responses_fit_up_to_the_limit() -> None:
    """Responses can be sent until the unsent bytes of all connections reach the limit."""
    budget = new_budget()
    assert Client(budget).send(60)
    assert Client(budget).send(40)
    assert not Client(budget).send(1)


def test_sent_bytes_no_longer_count() -> None:
    """The bytes of a response no longer count when the transport has sent all of them, or when the connection releases
    its share of the budget."""
    budget = new_budget()
    first, second = Client(budget), Client(budget)
    assert first.send(100)
    first.transport.held = 0
    assert second.send(100)
    second.share.release_if_sent()
    assert not first.send(1)
    second.share.release()
    assert first.send(100)


def test_connections_of_stalled_clients_are_closed() -> None:
    """If the budget is used up, connections that have stalled are closed. Connections that are only slow stay open."""
    budget = new_budget()
    stalled, slow = Client(budget, "stalled"), Client(budget, "idle")
    assert stalled.send(50)
    assert slow.send(50)
    assert Client(budget).send(50)
    assert (stalled.transport.held, slow.transport.held) == (0, 50)


def test_a_lost_connection_uses_no_budget() -> None:
    """When a connection is lost, its share of the budget is released. After that, the share never closes the
    connection."""
    budget = new_budget()
    client = Client(budget, "stalled")
    assert client.send(100)
    client.share.close()
    client.share.evict_if_stalled(0.0)
    assert client.transport.held == 100
    assert Client(budget).send(100)


def test_the_work_for_a_response_does_not_grow_with_the_number_of_connections() -> None:
    """2,000 open connections have received a large response each. A further response looks at a few connections only,
    those whose bytes have to leave the budget, and finds its room."""
    budget = new_budget()
    idle = [Client(budget) for _ in range(2000)]
    for client in idle:
        assert client.send(10)
        client.transport.held = 0
    looks_before = sum(client.transport.looks for client in idle)
    for _ in range(100):
        assert Client(budget).send(1)
    looks = sum(client.transport.looks for client in idle) - looks_before
    assert looks_before <= 2 * len(idle)
    assert looks <= 2 * 100


def test_a_slow_client_does_not_hide_sent_bytes() -> None:
    """The connection that reserved first still has unsent bytes. Those that reserved later have sent theirs, so a
    response finds its room, and the unsent bytes still count."""
    budget = new_budget()
    slow, *others = [Client(budget) for _ in range(4)]
    for client in (slow, *others):
        assert client.send(25)
    for client in others:
        client.transport.held = 0
    assert Client(budget).send(75)
    assert not Client(budget).send(1)


def test_a_second_response_of_a_connection_replaces_its_share() -> None:
    """A connection that sends a second response has one share, of the size of the second response. After it is
    released, all of the budget is free."""
    budget = new_budget()
    client = Client(budget)
    assert client.send(60)
    assert client.send(40)
    assert not Client(budget).send(61)
    assert Client(budget).send(60)
    client.share.close()
    assert Client(budget).send(40)
