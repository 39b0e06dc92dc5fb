"""One upstream's mirror, put together. Apart from `registry.opening`, since it brings the HTTP clients along, which a
server that mirrors nothing need not load."""

from __future__ import annotations

from collections.abc import Callable

from registry.config import Upstream
from registry.mirror.mirror import Mirror
from registry.upstream.client import make_source
from storage.stored import StoredRegistry


def make_mirror(upstream: Upstream, stored: StoredRegistry, clock: Callable[[], float]) -> Mirror:
    """Nothing is contacted yet. Its `aclose` ends it, the source included."""
    source = make_source(upstream, stored.records, stored.turns, clock)
    return Mirror(stored, source, stored.partials, stored.records, stored.turns, upstream, clock)
