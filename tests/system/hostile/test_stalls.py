"""Tests that no kind of request blocks the event loop of a worker for longer than 50 ms."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.system.hostile.attacked_site import AttackedSite
from tests.system.hostile.ping_watcher import PingWatcher
from tests.system.hostile.stalls import MAX_STALL_MS, StallResult, all_attacks, measure, summary, table

pytestmark = pytest.mark.alone

KINDS = all_attacks()


@pytest.fixture(scope="module")
def watcher(site: AttackedSite) -> Iterator[PingWatcher]:
    with PingWatcher(site.server) as started:
        yield started


@pytest.fixture(scope="module")
def results() -> Iterator[dict[str, StallResult]]:
    """Collects the results. They are printed at the end, with the largest delay first."""
    collected: dict[str, StallResult] = {}
    yield collected
    print(f"\n{table(collected)}\n\n{summary(collected)}")


def test_there_are_many_kinds() -> None:
    """There are at least sixty kinds of requests."""
    assert len(KINDS) >= 60


@pytest.mark.parametrize("name", KINDS)
def test_no_request_blocks_a_worker(
    site: AttackedSite, watcher: PingWatcher, results: dict[str, StallResult], name: str
) -> None:
    """While a worker handles this kind of request, each ping takes less than 50 ms. The request gets a response, and
    its status is not 500."""
    result = results[name] = measure(site, watcher, KINDS[name])
    assert result.blocked_ms < MAX_STALL_MS, str(result)
    assert result.status not in (0, 500), str(result)
