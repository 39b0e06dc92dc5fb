"""Connection slots: the permits for the connections to one upstream, which fills (downloads into the cache) and
pass-throughs (blobs that go to one client without being stored) share."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from registry.mirror.fill.slots import ConnectionSlots, Demand
from registry.mirror.upstream_client import UpstreamClient
from registry.single_flight import cancel_and_wait
from storage.data_dir.file_leases import FileLeases
from storage.data_dir.system import System

CONNECTIONS = 8
"""Number of connection slots."""
PIECES = 100
"""Number of pieces that each connection of a fill gets one after the other."""


def slots_of(leases: FileLeases, connections: int = CONNECTIONS) -> ConnectionSlots:
    """Returns the slots of an upstream with that number of connections."""
    upstream: UpstreamClient = SimpleNamespace(name="hub", connections=connections)  # type: ignore[assignment]
    return ConnectionSlots(leases, upstream)


@pytest.fixture
def leases(tmp_path: Path) -> Iterator[FileLeases]:
    opened = FileLeases(tmp_path / "leases", System())
    yield opened
    opened.close()


async def use_all_connections(slots: ConnectionSlots) -> None:
    """Uses slots as a fill does that a client has requested: takes a slot anew for each piece, over as many connections
    as there are slots."""
    demand = Demand()
    demand.request()

    async def run_connection(number: int) -> None:
        for piece in range(PIECES):
            slot = slots.additional(demand) if number else slots.primary(demand, is_new_connection=not piece)
            async with slot as has_slot:
                if has_slot:
                    await asyncio.sleep(0.002 * (number + 1))  # the connections do not end their pieces together

    await asyncio.gather(*(run_connection(number) for number in range(slots.max_connections)))


async def wait_until_few_are_free(slots: ConnectionSlots, leases: FileLeases) -> None:
    """Waits until at most two slots are free. Raises TimeoutError after a minute."""
    has_slot = True
    async with asyncio.timeout(60):
        while has_slot:
            await asyncio.sleep(0.001)
            async with leases.try_slot("upstream-hub", slots.max_connections, keep_free=2) as has_slot:
                pass


@pytest.mark.parametrize("waits_for_client", [False, True])
async def test_pass_through_gets_a_slot_beside_a_fill_that_uses_all(leases: FileLeases, waits_for_client: bool) -> None:
    """A fill takes each free slot again within milliseconds, so several slots are never free at the same moment.
    Pass-throughs of small and of large blobs get a slot long before the fill ends."""
    slots = slots_of(leases)
    fill = asyncio.create_task(use_all_connections(slots))
    for _ in range(3):
        await wait_until_few_are_free(slots, leases)
        async with slots.pass_through(waits_for_client=waits_for_client):
            assert not fill.done()
    await cancel_and_wait([fill])
