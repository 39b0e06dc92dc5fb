"""`UpkeepComponents`: what the server's background jobs, the management API and the commands of upkeep use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from registry.config import Settings
from registry.router import Router
from storage.jobs import JSON
from storage.store.stored_registry import StoredRegistry
from storage.upkeep.job_runner import JobContext, Work


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
    works["import-registry"] = partial(_import_directory, store, router)
    works["import-remote"] = partial(_import_remote, settings, store, router)
    return UpkeepComponents(settings, store, router, works)


# The modules of imports, and the HTTP client that one of them uses, are imported when the first import runs: most
# servers never run one.


async def _import_directory(store: StoredRegistry, router: Router, context: JobContext) -> JSON:
    from registry.migration.directory_import import import_directory

    return await import_directory(store, router, context)


async def _import_remote(settings: Settings, store: StoredRegistry, router: Router, context: JobContext) -> JSON:
    from registry.migration.remote_import import import_remote

    return await import_remote(store, router, context, settings.upstream)
