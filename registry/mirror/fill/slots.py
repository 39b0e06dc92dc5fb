"""Limits the connections to one upstream over all processes, and decides which download gets a connection first
(`ConnectionSlots`).

- A *fill* is the work of one process to get one blob.
- A *prefetch fill* gets a blob that no client has requested yet, but that a client will probably request soon.
- An *unattended* fill gets a blob for clients that have all left.
- A *pass-through* sends a blob to one client without storing it, because the disk is too full.
- A *connection slot* is a permit for one request to the upstream. The number of slots is limited. Each request of a
  fill or pass-through holds a slot until the request has ended.

Fills for which a client waits get slots first. Among these fills, the fills of small blobs, such as configs, get slots
first. Prefetch fills leave some slots free for fills for which a client waits. Unattended fills leave one more slot
free, for prefetch fills.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    AsyncExitStack,
    asynccontextmanager,
    suppress,
)
from typing import Final

from registry.mirror.fill.demand import ClientsChanged, Demand, run_until_change
from registry.mirror.fill.slot_holders import LONG_WAIT_SECONDS, SlotHolder, SlotHolders
from registry.mirror.upstream_client import UpstreamClient
from registry.single_flight import cancel_and_wait
from storage.leases import Leases
from storage.names import RepositoryName

SMALL_BLOB_BYTES: Final = 64 * 1024
"""Largest size of a *small* blob. Requests for small blobs get slots before requests for larger blobs."""
GIVE_WAY_SECONDS: Final = 10.0
"""A request for a larger blob becomes *urgent* after it has waited for this time in the queue, so that a steady stream
of small blobs cannot keep it waiting forever. A request for a small blob is urgent from the start. While an urgent
request waits, requests that are not urgent take no slot."""
MAX_SPARE_SLOTS: Final = 2
"""Largest number of *spare* slots: slots that prefetch fills leave free for other fills. Pass-throughs of large blobs
never take the spare slots. Unattended fills leave one more slot free, for prefetch fills."""
MAX_UNATTENDED: Final = 64
"""Largest number of unattended fills of one upstream that wait for a slot in one process. Each has two open files and a
timer. If more fills wait, one fill is given up:

- If some of the fills have never had a slot: of these fills, the one that has waited longest.
- If all of the fills have had a slot: the fill that has waited longest."""
YIELD_SECONDS: Final = 0.015
"""Time for which a fill that has a connection waits before it enters the queue, or before it takes the last free slot.
During this time, a fill that is already in the queue can take the free slot. The time is longer than the 0.01 s after
which a fill in the queue looks for a free slot again."""
PREFETCH_POLL_SECONDS: Final = 0.04
"""Time between two attempts of a prefetch fill to get a slot."""
WAITING_MARKS: Final = 8
"""Number of marks. A request that waits for a connection slot takes a *mark*, which tells all processes that a request
waits. Marks use the same kind of lock as connection slots (`Leases.slot`), under another name. A mark permits no
connection. If all marks are taken, the request waits for the connection slot without a mark. The number is small,
because a check whether any mark is taken makes one system call for each mark."""
MARK_SECONDS: Final = 0.1
"""Seconds that a request waits for a connection slot before it takes a mark. Shorter waits are normal, because a
fill gives its slot back after each request and then takes a slot again."""


class ConnectionSlots:
    """The slots of one upstream. Prefetch fills poll for a slot; other fills wait for a slot in a queue."""

    def __init__(self, leases: Leases, upstream: UpstreamClient) -> None:
        self._leases = leases
        self._upstream = upstream
        self._name = f"upstream-{upstream.name}"
        # No name of an upstream contains a space, so no other upstream has slots with these names.
        self._pass_through_name = f"{self._name} pass-through"
        self._waiting_name = f"{self._name} waiting"
        self._long_waiting_name = f"{self._name} long-waiting"
        self._holders = SlotHolders(self.has_waiting_request, self._has_long_waiting_request)
        self._unattended: dict[Demand, None] = {}
        """The unattended fills of this process that wait for a slot, in the order in which they began to wait."""

    @property
    def max_connections(self) -> int:
        """Number of slots: the maximum number of connections to the upstream, over all processes."""
        return self._upstream.connections

    @property
    def _spare_slots(self) -> int:
        """Number of spare slots (`MAX_SPARE_SLOTS`); always smaller than `max_connections`, so that prefetch fills and
        pass-throughs can take at least one slot."""
        return min(MAX_SPARE_SLOTS, self.max_connections - 1)

    async def wait_for_prefetch_slot(self) -> None:
        """Waits until at least one slot is free besides the spare slots, so that a prefetch fill may take a slot. Takes
        such a slot for a moment, and gives it back before it returns. The calls in one process return in the order in
        which they were made."""
        async with self._leases.slot(self._name, self.max_connections, keep_free=self._spare_slots):
            return

    @asynccontextmanager
    async def first_connection_slot(
        self, demand: Demand, *, is_new_connection: bool, blob_size: int
    ) -> AsyncIterator[bool]:
        """Waits for a slot for one request on a fill's first connection, and holds the slot inside the `async with`
        block. Yields True if the block holds a slot. Yields False if nothing needs the blob any more.

        - `demand`: says which clients need the fill's blob. If no client waits for the blob, some slots stay free
          (`MAX_SPARE_SLOTS`).
        - `is_new_connection`: True for the first request on the connection, False for a later request. Matters only
          while a client waits for the blob. The first request then enters the queue at once. A later request takes a
          slot at once if at least two slots are free and no urgent request waits. Otherwise, the later request waits
          for `YIELD_SECONDS` before it enters the queue, so that requests in the queue get a slot first.
        - `blob_size`: in bytes."""
        async with AsyncExitStack() as held:
            has_slot = False
            while not has_slot and demand.needs_blob():
                if demand.has_clients:
                    has_slot = not is_new_connection and await self._try_slot(held, keep_free=1)
                    if not has_slot:
                        has_slot = await self._wait_in_queue(held, demand, is_new_connection, blob_size)
                elif demand.is_unattended:
                    has_slot = await self._wait_unattended(held, demand)
                else:
                    has_slot = await self._try_slot(held, keep_free=self._spare_slots)
                    if not has_slot:
                        with suppress(TimeoutError):
                            async with asyncio.timeout(PREFETCH_POLL_SECONDS):
                                await demand.requested.wait()
            demand.had_slot = demand.had_slot or has_slot
            yield has_slot

    async def _try_slot(self, held: AsyncExitStack, keep_free: int) -> bool:
        """If more than `keep_free` slots are free, takes a slot, and holds it until `held` is closed. Takes no slot
        while an urgent request waits (`GIVE_WAY_SECONDS`). Returns whether it took a slot."""
        async with AsyncExitStack() as attempt:
            slot = self._leases.try_slot(self._name, self.max_connections, keep_free=keep_free)
            if has_slot := await attempt.enter_async_context(slot):
                held.push_async_exit(attempt.pop_all())
            return has_slot

    async def _wait_in_queue(
        self, held: AsyncExitStack, demand: Demand, is_new_connection: bool, blob_size: int
    ) -> bool:
        """Waits in the queue for a slot, and holds it until `held` is closed. Stops waiting when no client waits for
        the blob any more. Returns whether it took a slot."""
        if not is_new_connection:
            await asyncio.sleep(YIELD_SECONDS)
            if not demand.has_clients:
                return False
        queued = self._queued_slots((self._name, self.max_connections), blob_size=blob_size)
        try:
            await run_until_change(demand, held.enter_async_context(queued))
        except ClientsChanged:
            return False
        return True

    async def _wait_unattended(self, held: AsyncExitStack, demand: Demand) -> bool:
        """Waits until an unattended fill may take a slot. Then takes a slot, and holds it until `held` is closed. Stops
        waiting when the fill with this `demand` is no longer unattended. If more than `MAX_UNATTENDED` fills wait,
        first gives up one of these fills. Returns whether it took a slot."""
        self._unattended[demand] = None
        if len(self._unattended) > MAX_UNATTENDED:
            oldest = next(iter(self._unattended))
            given_up = next((waiting for waiting in self._unattended if not waiting.had_slot), oldest)
            del self._unattended[given_up]
            given_up.give_up()
            if given_up is demand:
                return False
        try:
            slots_to_leave = min(self._spare_slots + 1, self.max_connections - 1)
            slot = self._leases.slot(self._name, self.max_connections, keep_free=slots_to_leave)
            await run_until_change(demand, held.enter_async_context(slot))
        except ClientsChanged:
            return False
        else:
            return True
        finally:
            self._unattended.pop(demand, None)

    @asynccontextmanager
    async def pass_through_slot(
        self, holder: SlotHolder, *, waits_for_client: bool, blob_size: int
    ) -> AsyncIterator[None]:
        """Waits for a slot for a pass-through and holds it inside the `async with` block.

        - `holder`: the pass-through. It is cut off if its client is slow while other requests wait for a slot.
        - `waits_for_client`: whether the pass-through may have to wait for its client, because not all bytes fit in
          memory. All such pass-throughs together hold at most `max_connections` - `_spare_slots` slots, so that slow
          clients cannot take all slots.
        - `blob_size`: in bytes."""
        # A pass-through that may wait for its client also takes a slot of a second, smaller group. The parameter
        # `keep_free` of `Leases.slot` cannot replace this group. With `keep_free`, the pass-through would wait until
        # several slots are free at the same moment. This moment may never come, because a running fill takes each free
        # slot within milliseconds.
        groups = [(self._name, self.max_connections)]
        if waits_for_client:
            groups.insert(0, (self._pass_through_name, self.max_connections - self._spare_slots))
        async with self._queued_slots(*groups, blob_size=blob_size):
            with self.holding(holder):
                yield

    def repository_share(self, repo: RepositoryName) -> AbstractAsyncContextManager[bool]:
        """Takes a *share* of a repository, if a share is free, and holds it inside the `async with` block. Yields
        whether the block holds a share.

        A request of a fill needs a slot, but no share. A request without a share is cut off if it is slow while other
        requests wait for a slot. Each repository has `max_connections` - `_spare_slots` shares. So the slow blobs of
        one repository leave the spare slots to other requests."""
        return self._leases.try_slot(f"{self._name} of {repo}", self.max_connections - self._spare_slots)

    def holding(self, holder: SlotHolder) -> AbstractContextManager[None]:
        """Registers `holder` (a pass-through, or a request of a fill) as the holder of a slot inside the `with` block.
        The holder is cut off if it is slow while other requests wait for a slot."""
        return self._holders.holding(holder)

    @asynccontextmanager
    async def _queued_slots(self, *groups: tuple[str, int], blob_size: int) -> AsyncIterator[None]:
        """Waits for a slot of each group, one group after the other, and holds the slots inside the `async with` block.
        Runs `_mark_wait` during the wait. The wait becomes urgent as described at `GIVE_WAY_SECONDS`. `groups`: for
        each group, the name of its slots and the number of its slots."""
        urgent_after = 0.0 if blob_size <= SMALL_BLOB_BYTES else GIVE_WAY_SECONDS
        marking = asyncio.create_task(self._mark_wait())
        try:
            async with AsyncExitStack() as held:
                for name, count in groups:
                    await held.enter_async_context(self._leases.slot(name, count, urgent_after=urgent_after))
                await cancel_and_wait([marking])
                yield
        finally:
            await cancel_and_wait([marking])

    async def _mark_wait(self) -> None:
        """Takes a mark after `MARK_SECONDS`. After `LONG_WAIT_SECONDS`, also takes a mark of a second kind, which says
        that a request has waited for `LONG_WAIT_SECONDS`. Holds the marks until the task is cancelled."""
        clock = asyncio.get_running_loop().time
        long_after = clock() + LONG_WAIT_SECONDS
        await asyncio.sleep(MARK_SECONDS)
        async with self._leases.slot(self._waiting_name, WAITING_MARKS):
            await asyncio.sleep(long_after - clock())
            async with self._leases.slot(self._long_waiting_name, WAITING_MARKS):
                await asyncio.Event().wait()

    def has_waiting_request(self) -> bool:
        """Returns whether a request of any process has waited in the queue for `MARK_SECONDS`. Raises StorageFailed."""
        return self._leases.is_any_slot_held(self._waiting_name, WAITING_MARKS)

    def _has_long_waiting_request(self) -> bool:
        """Returns whether a request of any process has waited for `LONG_WAIT_SECONDS`. Raises StorageFailed."""
        return self._leases.is_any_slot_held(self._long_waiting_name, WAITING_MARKS)

    @asynccontextmanager
    async def further_connection_slot(self, demand: Demand) -> AsyncIterator[bool]:
        """Takes a slot for a further connection of a fill, if possible, and holds it inside the `async with` block.
        Yields whether the block holds a slot. Never waits in the queue, and takes no slot while an urgent request waits
        (`GIVE_WAY_SECONDS`).

        - If enough slots stay free for other fills, takes a slot at once.
        - Otherwise, if a client waits for the blob: waits for `YIELD_SECONDS`, so that a fill in the queue can take the
          last free slot. Then takes a slot, even the last one, if a slot is free.
        - Otherwise, takes no slot."""
        has_clients = demand.has_clients
        # Leaves one slot for the first connection of another fill. If no client waits for the blob, leaves the spare
        # slots as well.
        slots_to_leave = min(1 if has_clients else MAX_SPARE_SLOTS + 1, self.max_connections - 1)
        async with self._leases.try_slot(self._name, self.max_connections, keep_free=slots_to_leave) as has_slot:
            if has_slot:
                yield True
                return
        if not has_clients:
            yield False
            return
        await asyncio.sleep(YIELD_SECONDS)
        async with self._leases.try_slot(self._name, self.max_connections) as has_slot:
            yield has_slot
