"""Two hundred requests of any kind at the same time make two workers use less than 300 MiB more, and only while the
requests last."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.fakes.process_resources import pss_of
from tests.system.hostile import client_loads
from tests.system.hostile.attacked_site import AttackedSite, running_site
from tests.system.hostile.client_loads import LOADS
from tests.system.hostile.memory_growth import BOUND, KEPT, Growth, grow

WARM = 20


class SharedSite:
    """One server for all tests, unless a test has to kill it."""

    def __init__(self, store: tuple[Path, Mapping[str, str]], stack: ExitStack) -> None:
        self._store = store
        self._stack = stack
        self._site: AttackedSite | None = None

    def get(self) -> tuple[AttackedSite, int]:
        """Returns a running site whose workers have served some usual requests, and the bytes of memory that they
        use."""
        if self._site is None or self._site.server.ended:
            self._site = self._stack.enter_context(running_site(*self._store))
            client_loads.prepare(self._site)
            for _ in range(WARM):
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
    found: dict[str, Growth] = {}
    yield found
    print()
    for name, growth in sorted(found.items(), key=lambda item: -item[1].peak):
        print(f"{name:52} {growth}")


@pytest.mark.parametrize("name", LOADS)
def test_many_at_once(sites: SharedSite, growths: dict[str, Growth], name: str) -> None:
    """Two hundred clients that do this at the same time make both workers together grow by less than 300 MiB. After
    that, most of the memory is released, and the workers are the same processes."""
    site, before = sites.get()
    workers = site.server.worker_pids()
    growth = growths[name] = grow(site.server, LOADS[name](site), before)
    print(f"\n{name}: {growth}")
    assert growth.peak < BOUND, str(growth)
    assert growth.kept < KEPT, str(growth)
    assert site.server.worker_pids() == workers
