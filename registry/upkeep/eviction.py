"""The job that evicts images from the cache of mirrored content (`eviction_work`), and functions that return the size
and the content of the cache.

An *upstream* is a registry that this registry mirrors. A *scope* is a set of repositories whose disk space is counted
together. There is one scope for each upstream, one for all upstreams together, and one for each quota (a limit on the
repositories whose names begin with a prefix). A *budget* is the largest size that a scope of cached content may have.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from registry.config import Settings
from registry.upkeep.budgets import CACHE_SCOPE, budget_of, scope_definitions, upstream_scope
from storage.cached_images import EvictedImage
from storage.errors import NameUnknown, Unsupported
from storage.human_text import size_text
from storage.jobs import JSON
from storage.store.stored_registry import StoredRegistry
from storage.upkeep.evictor import Budget, Evictor
from storage.upkeep.job_runner import JobContext, Work
from storage.upkeep.usage_counting import count_stored_scopes
from storage.usage import Usage

EVICTION_KIND: Final = "evict"
MAX_LISTED_IMAGES: Final = 1000
"""Largest number of images that the result of a job lists."""
SCOPES_WAIT_SECONDS: Final = 2.0
"""Longest time that a job waits until the server has defined the scopes. The server defines the scopes within
milliseconds after it starts or reloads its settings."""
SCOPES_POLL_SECONDS: Final = 0.05


@dataclass(frozen=True, slots=True)
class CachePart:
    """The cached content of an upstream, or of all upstreams together.

    - `upstream`: the name of the upstream; None: all upstreams.
    - `max_size`: the limit in the settings, in bytes; None: no limit.
    - `size`, `blobs`: the total size of the blobs in bytes, and their number. Each blob counts once.
    - `oldest_pull`: the time at which the least recently pulled image was pulled, in seconds since 1970; None: there
      are no images.
    - `is_complete`: False while the content is still being counted."""

    upstream: str | None
    max_size: int | None
    size: int
    blobs: int
    tags: int
    images: int
    oldest_pull: float | None
    is_complete: bool


@dataclass(frozen=True, slots=True)
class CacheSize:
    """The size of the cached content. Each field means the same as in `CachePart`."""

    upstream: str | None
    max_size: int | None
    size: int
    is_complete: bool


def eviction_arguments(max_bytes: int | None, upstream: str | None, *, dry_run: bool) -> dict[str, JSON]:
    """Returns the arguments of the eviction job.

    - `max_bytes`: the largest size of the cache after the eviction; None: the limits in the settings apply.
    - `upstream`: the upstream whose images are evicted; None: all upstreams.
    - `dry_run`: the job evicts nothing, and lists the images that it would evict."""
    return {"to": max_bytes, "upstream": upstream, "dry_run": dry_run}


def check_upstream(settings: Settings, upstream: str | None) -> None:
    """Raises NameUnknown if the settings have no upstreams, or if `upstream` is not None and no upstream in the
    settings has this name."""
    names = [configured.name for configured in settings.upstream]
    if not names:
        raise NameUnknown("no upstream is mirrored, so there is no cache; add an [[upstream]] to the settings")
    if upstream is not None and upstream not in names:
        raise NameUnknown(f"{upstream} is not mirrored; the upstreams are {', '.join(names)}")


def eviction_work(settings: Settings, store: StoredRegistry, evictor: Evictor) -> Work:
    """Returns the function that runs the eviction job. The function reports each evicted image to commands that watch
    the job. It returns the number of evicted images, their total bytes, and a list of the first `MAX_LISTED_IMAGES`
    images. In a dry run, these are the images that would be evicted."""

    async def work(context: JobContext) -> JSON:
        arguments = context.job.arguments
        upstream, max_bytes, dry_run = arguments.get("upstream"), arguments.get("to"), bool(arguments.get("dry_run"))
        check_upstream(settings, upstream)
        budgets = _budgets(settings, evictor, max_bytes, upstream)
        await context.report(message="counting the cache", unit="images")
        await _wait_for_scopes(settings, store.usage, evictor.limits.budgets if budgets is None else budgets)
        # Counts the scopes that the server has defined in the store.
        await count_stored_scopes(store.usage, store.leases)
        evicted: list[dict[str, Any]] = []
        totals = {"images": 0, "bytes": 0}

        async def on_evicted(image: EvictedImage) -> None:
            image_json = _image_to_json(image)
            totals["images"] += 1
            totals["bytes"] += image.bytes
            if len(evicted) < MAX_LISTED_IMAGES:
                evicted.append(image_json)
            context.step("would be evicted" if dry_run else "evicted", **image_json)
            await context.report(totals["images"], message=f"{size_text(totals['bytes'])} freed")

        if dry_run:
            for image in await _plan(evictor, budgets):
                await on_evicted(image)
        elif budgets is None:
            await evictor.evict(on_evicted)
        else:
            for budget in budgets:
                await evictor.evict_to(budget, on_evicted)
        await context.report(totals["images"], save_now=True)
        return {**totals, "dry_run": dry_run, "evicted": evicted}

    return work


def _budgets(settings: Settings, evictor: Evictor, max_bytes: int | None, upstream: str | None) -> list[Budget] | None:
    """Returns the budgets that the eviction must meet. Returns None if the eviction must meet all limits in the
    settings. Raises Unsupported if neither `max_bytes` nor the settings limit the cache of `upstream`."""
    if max_bytes is not None:
        return [budget_of(settings, upstream, max_bytes)]
    if upstream is None:
        if not evictor.limits:
            raise Unsupported("the settings do not limit the cache; say how large it may be, as in --to 200GiB")
        return None
    budgets = [budget for budget in evictor.limits.budgets if budget.scope == upstream_scope(upstream)]
    if not budgets:
        raise Unsupported(f"{upstream} has no cache_max in the settings; say how large its cache may be, with --to")
    return budgets


async def _wait_for_scopes(settings: Settings, usage: Usage, budgets: Sequence[Budget]) -> None:
    """Waits until the server has defined the scope of each budget in the same way as `settings` do. Raises Unsupported
    after `SCOPES_WAIT_SECONDS`.

    The job must not define the scopes: a command that runs the job may have other settings than the server."""
    definitions = {definition.name: definition for definition in scope_definitions(settings)}
    deadline = time.monotonic() + SCOPES_WAIT_SECONDS
    for budget in budgets:
        definition = definitions[budget.scope]
        while (scope_usage := await usage.scope(budget.scope)) is None or scope_usage.definition != definition:
            if time.monotonic() >= deadline:
                upstream = "all upstreams" if budget.scope == CACHE_SCOPE else budget.upstreams[0]
                raise Unsupported(
                    f"the server counts the cache of {upstream} with other settings, or does not count it yet; start "
                    "the server, run `entrepot reload`, or give this command the settings of the server"
                )
            await asyncio.sleep(SCOPES_POLL_SECONDS)


async def _plan(evictor: Evictor, budgets: list[Budget] | None) -> list[EvictedImage]:
    if budgets is None:
        return await evictor.plan_for_budgets()
    return [image for budget in budgets for image in await evictor.plan(budget)]


def _image_to_json(image: EvictedImage) -> dict[str, Any]:
    """Returns an evicted image as a JSON object."""
    return {
        "upstream": image.upstream,
        "repository": image.repository,
        "digest": image.digest,
        "tags": list(image.tags),
        "manifests": image.manifests,
        "last_pulled": image.last_pulled,
        "bytes": image.bytes,
    }


async def read_cache_sizes(settings: Settings, store: StoredRegistry) -> list[CacheSize]:
    """Returns the size of the cached content of each upstream, and then of all upstreams together. Is much faster than
    `read_cache_status`, which counts all images. Returns an empty list if there are no upstreams."""
    limits = [(upstream_scope(upstream.name), upstream.name, upstream.cache_max) for upstream in settings.upstream]
    sizes = [await _cache_size(store, scope, name, max_size) for scope, name, max_size in limits]
    return [*sizes, await _cache_size(store, CACHE_SCOPE, None, settings.cache.max)] if sizes else []


async def _cache_size(store: StoredRegistry, scope: str, upstream: str | None, max_size: int | None) -> CacheSize:
    usage = await store.usage.scope(scope)
    return CacheSize(upstream, max_size, usage.bytes if usage else 0, bool(usage and usage.is_complete))


async def read_cache_status(settings: Settings, store: StoredRegistry) -> list[CachePart]:
    """Returns the cached content of each upstream, and then of all upstreams together."""
    parts: list[CachePart] = []
    for upstream in settings.upstream:
        parts.append(await _upstream_part(store, upstream_scope(upstream.name), upstream.name, upstream.cache_max))
    if settings.upstream:
        usage = await store.usage.scope(CACHE_SCOPE)
        pulls = [part.oldest_pull for part in parts if part.oldest_pull is not None]
        parts.append(
            CachePart(
                upstream=None,
                max_size=settings.cache.max,
                size=usage.bytes if usage else 0,
                blobs=usage.blobs if usage else 0,
                tags=usage.tags if usage else 0,
                images=sum(part.images for part in parts),
                oldest_pull=min(pulls, default=None),
                is_complete=bool(usage and usage.is_complete),
            )
        )
    return parts


async def _upstream_part(store: StoredRegistry, scope: str, upstream: str, max_size: int | None) -> CachePart:
    usage, summary = await store.usage.scope(scope), await store.cached_images.summary(upstream)
    return CachePart(
        upstream=upstream,
        max_size=max_size,
        size=usage.bytes if usage else 0,
        blobs=usage.blobs if usage else 0,
        tags=usage.tags if usage else 0,
        images=summary.images,
        oldest_pull=summary.oldest_pull,
        is_complete=bool(usage and usage.is_complete),
    )
