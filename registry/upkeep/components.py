"""`UpkeepComponents`: what the server's background jobs, the management API and the commands of upkeep use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from registry.config import Settings
from registry.router import Router
from registry.upkeep.backup_work import backup_work
from storage.store.stored_registry import StoredRegistry
from storage.upkeep.job_runner import Work


@dataclass(frozen=True, slots=True)
class UpkeepComponents:
    """The opened registry and the kinds of jobs that run on it. `store` is the hosted registry with all stores of the
    data directory; `router` leads to it and to the mirrors. `works` maps each kind of job to its work."""

    settings: Settings
    store: StoredRegistry
    router: Router
    works: Mapping[str, Work]


def upkeep_components(settings: Settings, store: StoredRegistry, router: Router) -> UpkeepComponents:
    """Builds the components for an opened registry."""
    works: dict[str, Work] = {}
    works["backup"] = backup_work(store, settings.data)
    return UpkeepComponents(settings, store, router, works)
