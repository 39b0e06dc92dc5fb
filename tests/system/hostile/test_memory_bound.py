"""Tests that two hundred expensive requests at the same time make two workers use less than 300 MiB of additional
memory, and that most of this memory is released afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.fakes.process_resources import pss_of
from tests.system.hostile import client_loads
from tests.system.hostile.attacked_site import AttackedSite, running_site
from tests.system.hostile.client_loads import LOADS
from tests.system.hostile.memory_growth import MAX_GROWTH_BYTES, MAX_KEPT_BYTES, Growth, grow

WARM_UP_ROUNDS = 20
"""How often the ordinary requests are sent before the measurement."""


class SharedSite:
    """One server for all tests. If a test has killed the server, the next test starts a new one."""

    def __init__(self, store: tuple[Path, Mapping[str, str]], stack: ExitStack) -> None:
        self._store = store
        self._stack = stack
        self._site: AttackedSite | None = None

    def get(self) -> tuple[AttackedSite, int]:
        """Returns a running server whose workers have already served some ordinary requests, and the memory of the
        workers in bytes."""
        if self._site is None or self._site.server.ended:
            self._site = self._stack.enter_context(running_site(*self._store))
            client_loads.prepare(self._site)
            for _ in range(WARM_UP_ROUNDS):
                self._site.ask("GET", "/v2/_catalog?n=100", login="admin")
                self._site.ask("GET", "/v2/large/tags/tags/list")
                self._site.ask("GET", "/api/v1/audit", login="admin")
        return self._site, pss_of(self._site.server.worker_pids())


@pytest.fixture(scope="module")
def sites(store: tuple[Path, Mapping[str, str]]) -> Iterator[SharedSite]:
    with ExitStack() as stack:
        yield SharedSite(store, stack)


@pytest.fixture(scope="module")
def growths() -> Iterator[dict[str, Growth]]:
    """Collects the results, which are printed at the end, the largest first."""
    results: dict[str, Growth] = {}
    yield results
    print()
    for name, growth in sorted(results.items(), key=lambda item: -item[1].peak):
        print(f"{name:52} {growth}")


@pytest.mark.parametrize("name", LOADS)
def test_memory_of_two_hundred_simultaneous_requests(sites: SharedSite, growths: dict[str, Growth], name: str) -> None:
    """Two hundred clients send this kind of request at the same time. The memory of both workers together grows by less
    than 300 MiB, and most of it is released afterwards. No worker was restarted."""
    site, bytes_before = sites.get()
    workers = site.server.worker_pids()
    growth = growths[name] = grow(site.server, LOADS[name](site), bytes_before)
    print(f"\n{name}: {growth}")
    assert growth.peak < MAX_GROWTH_BYTES, str(growth)
    assert growth.kept < MAX_KEPT_BYTES, str(growth)
    assert site.server.worker_pids() == workers
