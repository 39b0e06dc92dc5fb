"""Computes, from the settings about disk space, the scopes that are counted (`scope_definitions`), the limits of the
cache (`cache_limits`), and the space that must stay free (`min_free_space`). A *scope* is a set of repositories whose
disk space is counted together. A *budget* is the largest number of bytes that a scope of the cache may use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from registry.config import Settings
from storage.cached_images import Cooldowns, IsKept
from storage.data_dir.reserve import MinFreeSpace
from storage.patterns import NameSet
from storage.upkeep.evictor import Budget, CacheLimits
from storage.usage import ScopeDefinition

CACHE_SCOPE: Final = "cache"
"""Name of the scope of all mirrored content."""
_TARGET_FREE_FACTOR: Final = 1.1
"""The default of the setting `cache.target_free` is `cache.min_free` times this factor."""


def upstream_scope(upstream: str) -> str:
    """Returns the name of the scope of an upstream's content."""
    return f"{CACHE_SCOPE} {upstream}"


def quota_scope(prefix: str) -> str:
    """Returns the name of the scope of a quota, a limit on the repositories whose names begin with `prefix`."""
    return f"quota {prefix}"


def scope_definitions(settings: Settings) -> list[ScopeDefinition]:
    """Returns the scopes: one for each upstream, one for all upstreams together, and one for each quota."""
    upstream_prefixes = tuple(f"{upstream.name}/" for upstream in settings.upstream)
    scopes = [
        ScopeDefinition(upstream_scope(upstream.name), (f"{upstream.name}/",), upstream=upstream.name)
        for upstream in settings.upstream
    ]
    if upstream_prefixes:
        scopes.append(ScopeDefinition(CACHE_SCOPE, upstream_prefixes))
    scopes += [
        ScopeDefinition(
            quota_scope(quota.prefix),
            (quota.prefix,),
            # a quota for all repositories does not count mirrored ones
            excluded=() if quota.prefix else upstream_prefixes,
            max_bytes=quota.max_size,
            max_tags=quota.max_tags,
        )
        for quota in settings.quota
    ]
    return scopes


def cache_limits(settings: Settings, cooldowns: Cooldowns | None = None) -> CacheLimits:
    """Returns the limits of the cache. `cooldowns`: the cooldowns of the upstreams; None: there are none. A *cooldown*
    is the period after a tag moves at the upstream, in which clients get the older image. The cache keeps the older
    image until the cooldown ends."""
    upstreams = tuple(upstream.name for upstream in settings.upstream)
    budgets = [
        Budget(upstream_scope(upstream.name), (upstream.name,), upstream.cache_max)
        for upstream in settings.upstream
        if upstream.cache_max is not None
    ]
    if upstreams and settings.cache.max is not None:
        budgets.append(Budget(CACHE_SCOPE, upstreams, settings.cache.max))
    min_free = settings.cache.min_free if upstreams else 0
    target_free = settings.cache.target_free or int(min_free * _TARGET_FREE_FACTOR)
    return CacheLimits(upstreams, tuple(budgets), min_free, target_free, _name_matcher(settings.cache.keep), cooldowns)


def budget_of(settings: Settings, upstream: str | None, max_bytes: int) -> Budget:
    """Returns a budget of `max_bytes` bytes for an upstream, or for all upstreams together if `upstream` is None."""
    if upstream is not None:
        return Budget(upstream_scope(upstream), (upstream,), max_bytes)
    return Budget(CACHE_SCOPE, tuple(configured.name for configured in settings.upstream), max_bytes)


def min_free_space(settings: Settings) -> MinFreeSpace | None:
    """Returns how much of the disk must stay free after a push. Returns None if the settings have no such limit."""
    disk = settings.disk
    return MinFreeSpace(disk.min_free, disk.min_free_percent) if disk.min_free or disk.min_free_percent else None


def _name_matcher(patterns: Sequence[str]) -> IsKept:
    """Returns a function that tells whether a repository's name matches one of the patterns."""
    names = NameSet.of(patterns)
    return names.__contains__ if patterns else lambda _: False
