"""Processes killed during a fill: no client gets wrong bytes, and stored bytes are not fetched again."""

from __future__ import annotations

import os
import signal
import time

from tests.fakes.client_images import MIB
from tests.fakes.hub.hub import repeated, union
from tests.fakes.mirror_site import BackgroundGet, MirrorSite

BIG = 48 * MIB
SLOW = 2 * MIB
"""Bytes a second and connection, so that a blob is on its way for a while."""


def begun(site: MirrorSite) -> dict[int, list[BackgroundGet]]:
    """Starts two readers at each worker, which are in the middle of the blob."""
    site.start(1000, BIG, settings='prefetch = "off"', rate=SLOW)
    site.inspect()
    readers = {pid: [site.get(worker=pid) for _ in range(2)] for pid in site.server.worker_pids()}
    assert len(readers) == 2
    for reader in (each for pair in readers.values() for each in pair):
        reader.reached(MIB)
    return readers


def test_the_owner_is_killed(site: MirrorSite) -> None:
    """The readers of the other worker notice nothing. The readers of the killed worker continue with Range. No stored
    byte is requested again."""
    readers = begun(site)
    owner = site.owner()
    here, before = site.extents(), time.monotonic()
    os.kill(owner, signal.SIGKILL)
    site.hub.set(rate=0)
    assert 0 < sum(stop - start for start, stop in here) < BIG
    broken, others = readers.pop(owner), next(iter(readers.values()))
    for reader in others:
        assert reader.ended().whole
        assert reader.body == site.blob
    for reader in broken:
        assert site.finish(reader) == site.blob
    assert site.refetched(here, before) == []
    assert union(site.hub.sent(site.digest)) == [(0, BIG)]


def test_one_owner_after_another_is_killed(site: MirrorSite) -> None:
    """Each worker is killed as soon as it owns the fill. In the end, every reader has the right bytes, and no stored
    byte was lost."""
    readers = begun(site)
    for _ in range(3):
        at = site.extents()[0][1]
        here, before = site.extents(), time.monotonic()
        os.kill(site.owner(), signal.SIGKILL)
        again = site.get(span=f"{at}-{at + MIB - 1}").ended()
        while again.status == 0:  # it had reached the one that was killed
            again = site.get(span=f"{at}-{at + MIB - 1}").ended()
        assert again.whole
        assert again.body == site.blob[at : at + MIB]
        assert site.refetched(here, before) == []
    site.hub.set(rate=0)
    for reader in (each for pair in readers.values() for each in pair):
        assert site.finish(reader) == site.blob
    assert union(site.hub.sent(site.digest)) == [(0, BIG)]


def test_a_worker_that_only_follows_is_killed(site: MirrorSite) -> None:
    """If a worker that only follows is killed, the fill continues, and no byte is sent twice."""
    readers = begun(site)
    owner = site.owner()
    (follower,) = set(readers) - {owner}
    os.kill(follower, signal.SIGKILL)
    site.hub.set(rate=0)
    for reader in readers[owner]:
        assert reader.ended().whole
        assert reader.body == site.blob
    for reader in readers[follower]:
        assert site.finish(reader) == site.blob
    assert repeated(site.hub.sent(site.digest)) == []
    assert union(site.hub.sent(site.digest)) == [(0, BIG)]


def test_the_server_is_killed(site: MirrorSite) -> None:
    """After a restart, the fill continues after the stored bytes."""
    readers = begun(site)
    here, before = site.extents(), time.monotonic()
    site.server.kill()
    site.hub.set(rate=0)
    assert 0 < sum(stop - start for start, stop in here) < BIG
    site.serve()
    for reader in (each for pair in readers.values() for each in pair):
        assert site.finish(reader) == site.blob
    assert site.refetched(here, before) == []
    assert union(site.hub.sent(site.digest)) == [(0, BIG)]


def test_the_server_is_stopped(site: MirrorSite) -> None:
    """SIGTERM does not wait for a fill. After a restart, the fill continues after the stored bytes, without another
    request for the manifest."""
    readers = begun(site)
    for reader in (each for pair in readers.values() for each in pair):
        reader.leave()
    site.hub.fault(on="blob", stall_after=0, times=None)
    before = time.monotonic()
    assert site.server.stop() == 0
    here = site.extents()
    assert 0 < sum(stop - start for start, stop in here) < BIG
    site.hub.clear()
    site.hub.set(rate=0)
    site.serve()
    assert site.get().ended().body == site.blob
    again = [seen for seen in site.hub.requests("blob", digest=site.digest) if seen.begun > before]
    assert any(seen.end == "whole" for seen in again)
    assert site.asked("manifest") == 1
