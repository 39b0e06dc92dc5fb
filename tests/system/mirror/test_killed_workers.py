"""Kills server processes during a fill, which is the download of a blob from the upstream into the mirror's cache. No
client gets wrong bytes, and no stored byte is fetched again. One worker owns the fill and downloads; the other worker
only reads the stored bytes."""

from __future__ import annotations

import os
import signal
import time

from tests.fakes.client_images import MIB
from tests.fakes.hub.hub import repeated, union
from tests.fakes.mirror_site import BackgroundGet, MirrorSite

BLOB_BYTES = 48 * MIB
PART_BYTES = MIB // 8
BYTES_PER_SECOND, LATER_BYTES_PER_SECOND = 2 * MIB, MIB * 5 // 8
"""The rate of each upstream connection, at first and once each client has received 1 MiB. The later rate is so low that
the fill still runs when a process is killed, even on a machine that stalls. In the end, the tests remove the limit with
`rate=0`, so that the missing bytes arrive quickly."""


def start_readers(site: MirrorSite) -> dict[int, list[BackgroundGet]]:
    """Starts the mirror and two clients of each worker. Returns the clients by worker once each has received 1 MiB. The
    image has a layer of 1000 bytes and a layer of BLOB_BYTES. All clients download the larger layer, `site.blob`."""
    site.start(1000, BLOB_BYTES, settings='prefetch = "off"', rate=BYTES_PER_SECOND)
    site.get_manifest()  # as a client does before it requests a blob
    readers = {pid: [site.get(worker=pid) for _ in range(2)] for pid in site.server.worker_pids()}
    assert len(readers) == 2
    for reader in (each for pair in readers.values() for each in pair):
        reader.wait_for_bytes(MIB)
    site.hub.set(rate=LATER_BYTES_PER_SECOND)
    return readers


def test_owner_of_the_fill_is_killed(site: MirrorSite) -> None:
    """The worker that owns the fill is killed. The clients of the other worker get the blob without an interruption.
    The clients of the killed worker get the rest with Range requests. No stored byte is requested from the upstream
    again."""
    readers = start_readers(site)
    owner = site.owner()
    stored, killed_at = site.extents(), time.monotonic()
    os.kill(owner, signal.SIGKILL)
    site.hub.set(rate=0)
    assert 0 < sum(stop - start for start, stop in stored) < BLOB_BYTES
    interrupted, other_readers = readers.pop(owner), next(iter(readers.values()))
    for reader in other_readers:
        assert reader.wait_for_end().is_complete
        assert reader.body == site.blob
    for reader in interrupted:
        assert site.finish(reader) == site.blob
    assert site.refetched(stored, killed_at) == []
    assert union(site.hub.sent_ranges(site.digest)) == [(0, BLOB_BYTES)]


def test_three_owners_of_the_fill_are_killed_in_turn(site: MirrorSite) -> None:
    """Three times, the worker that owns the fill is killed as soon as it owns it. In the end, every client has the
    right bytes, and no stored byte was fetched again."""
    readers = start_readers(site)
    for _ in range(3):
        offset = site.extents()[0][1]
        stored, killed_at = site.extents(), time.monotonic()
        os.kill(site.owner(), signal.SIGKILL)
        # The bytes from `offset` on are missing. To send them, a worker has to become the owner and continue the fill.
        reader_after = site.get(span=f"{offset}-{offset + PART_BYTES - 1}").wait_for_end()
        while reader_after.status == 0:  # the connection had reached the killed worker
            reader_after = site.get(span=f"{offset}-{offset + PART_BYTES - 1}").wait_for_end()
        assert reader_after.is_complete
        assert reader_after.body == site.blob[offset : offset + PART_BYTES]
        assert site.refetched(stored, killed_at) == []
    site.hub.set(rate=0)
    for reader in (each for pair in readers.values() for each in pair):
        assert site.finish(reader) == site.blob
    assert union(site.hub.sent_ranges(site.digest)) == [(0, BLOB_BYTES)]


def test_worker_that_does_not_own_the_fill_is_killed(site: MirrorSite) -> None:
    """The worker that does not own the fill is killed. The fill continues, and the upstream sends no byte twice."""
    readers = start_readers(site)
    owner = site.owner()
    (follower,) = set(readers) - {owner}
    os.kill(follower, signal.SIGKILL)
    site.hub.set(rate=0)
    for reader in readers[owner]:
        assert reader.wait_for_end().is_complete
        assert reader.body == site.blob
    for reader in readers[follower]:
        assert site.finish(reader) == site.blob
    assert repeated(site.hub.sent_ranges(site.digest)) == []
    assert union(site.hub.sent_ranges(site.digest)) == [(0, BLOB_BYTES)]


def test_fill_continues_after_the_server_was_killed(site: MirrorSite) -> None:
    """All processes are killed. After a restart, the fill continues after the stored bytes."""
    readers = start_readers(site)
    stored, killed_at = site.extents(), time.monotonic()
    site.server.kill()
    site.hub.set(rate=0)
    assert 0 < sum(stop - start for start, stop in stored) < BLOB_BYTES
    site.serve()
    for reader in (each for pair in readers.values() for each in pair):
        assert site.finish(reader) == site.blob
    assert site.refetched(stored, killed_at) == []
    assert union(site.hub.sent_ranges(site.digest)) == [(0, BLOB_BYTES)]


def test_fill_continues_after_the_server_was_stopped(site: MirrorSite) -> None:
    """On SIGTERM, the server stops without waiting for a fill. After a restart, the mirror gets only the missing
    bytes from the upstream, and does not request the manifest again."""
    readers = start_readers(site)
    for reader in (each for pair in readers.values() for each in pair):
        reader.leave()
    # From now on, new requests for the blob get no bytes. So the fill cannot end, and a server that waited for its end
    # would not stop.
    site.hub.fault(on="blob", stall_after=0, times=None)
    stopped_at = time.monotonic()
    assert site.server.stop() == 0
    stored = site.extents()
    assert 0 < sum(stop - start for start, stop in stored) < BLOB_BYTES
    site.hub.clear()
    site.hub.set(rate=0)
    site.serve()
    assert site.get().wait_for_end().body == site.blob
    assert site.refetched(stored, stopped_at) == []
    assert site.count_requests("manifest") == 1
