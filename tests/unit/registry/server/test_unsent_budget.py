"""The memory budget for responses that clients have not received yet."""

from __future__ import annotations

import asyncio

from registry.server.connection.unsent_budget import UnsentBudget, UnsentShare
from registry.server.gate.connection_limit import EvictionCandidate, EvictionKind

LIMIT = 100


class BufferedTransport(asyncio.Transport):
    """A transport that buffers as many bytes as the test says."""

    def __init__(self) -> None:
        super().__init__()
        self.held = 0

    def get_write_buffer_size(self) -> int:
        return self.held


class Client:
    """A connection with a share of the budget, whose client receives nothing."""

    def __init__(self, budget: UnsentBudget, kind: EvictionKind | None = None) -> None:
        self.kind = kind
        self.transport = BufferedTransport()
        self.share = UnsentShare(budget, self, self.transport, is_tls=False)

    def send(self, size: int) -> bool:
        held = self.share.reserve(size)
        self.transport.held += size if held else 0
        return held

    def eviction_candidate(self, now: float) -> EvictionCandidate | None:
        return None if self.kind is None else EvictionCandidate(self.kind, now, None)

    def evict(self) -> None:
        self.transport.held = 0
        self.share.close()


def budget() -> UnsentBudget:
    return UnsentBudget(LIMIT, lambda: 0.0)


def test_responses_fit_up_to_the_limit() -> None:
    """The shares of the budget add up to the limit at most."""
    made = budget()
    assert Client(made).send(60)
    assert Client(made).send(40)
    assert not Client(made).send(1)


def test_sent_bytes_leave_the_budget() -> None:
    """The bytes of a response count while the transport buffers some of them and the share keeps them."""
    made = budget()
    first, second = Client(made), Client(made)
    assert first.send(100)
    first.transport.held = 0
    assert second.send(100)
    second.share.release_if_sent()
    assert not first.send(1)
    second.share.release()
    assert first.send(100)


def test_stalled_clients_are_dropped_first() -> None:
    """If the budget has no room, connections that have stalled are closed. Connections that are only slow stay."""
    made = budget()
    stalled, slow = Client(made, "stalled"), Client(made, "idle")
    assert stalled.send(50)
    assert slow.send(50)
    assert Client(made).send(50)
    assert (stalled.transport.held, slow.transport.held) == (0, 50)


def test_a_lost_connection_holds_nothing() -> None:
    """When a connection is lost, its share of the budget is free, and the share cannot close the connection later."""
    made = budget()
    client = Client(made, "stalled")
    assert client.send(100)
    client.share.close()
    client.share.evict_if_stalled(0.0)
    assert client.transport.held == 100
    assert Client(made).send(100)
