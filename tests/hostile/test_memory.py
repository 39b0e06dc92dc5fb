"""Two hundred requests at once, of any kind, cost two workers less than 300 MiB, and only for as long as they last."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.hostile import crowds, memory
from tests.hostile.crowds import CROWDS
from tests.hostile.memory import BOUND, KEPT, Growth, grow
from tests.hostile.site import Site

WARM = 20


@pytest.fixture(scope="module")
def before(site: Site) -> int:
    """What the workers take once each has done a little of everything that is usual."""
    crowds.prepare(site)
    for _ in range(WARM):
        site.ask("GET", "/v2/_catalog?n=100", login="admin")
        site.ask("GET", "/v2/large/tags/tags/list")
        site.ask("GET", "/api/v1/audit", login="admin")
    return memory.pss(site.server.worker_pids())


@pytest.fixture(scope="module")
def growths() -> Iterator[dict[str, Growth]]:
    """What was measured; printed at the end."""
    found: dict[str, Growth] = {}
    yield found
    print()
    for name, growth in sorted(found.items(), key=lambda item: -item[1].peak):
        print(f"{name:52} {growth}")


@pytest.mark.parametrize("name", CROWDS)
def test_many_at_once(site: Site, before: int, growths: dict[str, Growth], name: str) -> None:
    """Two hundred clients that do this at once make both workers together grow by less than 300 MiB; when they have
    gone, most of it is given back, and the workers are the same processes as before."""
    workers = site.server.worker_pids()
    growth = growths[name] = grow(site.port, workers, CROWDS[name](site), before)
    assert growth.peak < BOUND, str(growth)
    assert growth.kept < KEPT, str(growth)
    assert site.server.worker_pids() == workers
