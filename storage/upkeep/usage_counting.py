"""Counts the content of *usage scopes* in the background. A usage scope is a set of repositories whose blobs, bytes and
tags the store counts (`storage.usage`)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Final

from storage.background_rounds import log_round_error
from storage.leases import Leases
from storage.usage import ScopeDefinition, Usage

COUNTING_SLOT: Final = "usage counting"
"""Name of the slot for counting. A slot is a permit that only one process at a time can hold."""
PAUSE_SECONDS: Final = 0.005
"""Seconds between two batches. Pushes and other changes of the store run in this pause."""
RETRY_SECONDS: Final = 30.0
"""Seconds between an error and the next attempt to count."""
log = logging.getLogger("storage.usage")


async def configure_and_count(usage: Usage, leases: Leases, definitions: Sequence[ScopeDefinition]) -> None:
    """Replaces the scopes in the store by `definitions`, and counts the content of new and changed scopes. Returns
    when all scopes are *complete*: all their content is counted. Only one process at a time counts. If that process
    dies, the next process that calls this function continues the count. Raises StorageFull, StorageFailed.

    Only the server may call this function. A command can have other settings, and would remove scopes of the
    server."""
    async with leases.slot(COUNTING_SLOT, count=1):
        await usage.configure(definitions)
        await _count(usage)


async def count_stored_scopes(usage: Usage, leases: Leases) -> None:
    """Counts the content of the scopes that are in the store, and changes none of their definitions. If another process
    already counts, waits for that process. Returns when all scopes are complete. Raises StorageFull, StorageFailed."""
    async with leases.slot(COUNTING_SLOT, count=1):
        await _count(usage)


async def _count(usage: Usage) -> None:
    """Counts until all scopes are complete."""
    is_logged = False
    while await usage.count_batch():
        if not is_logged and (names := await _uncounted_names(usage)):
            log.info("counting what is stored for: %s; their limits have no effect until the count is complete", names)
            is_logged = True
        await asyncio.sleep(PAUSE_SECONDS)
    if is_logged:
        log.info("counted what is stored; all limits are in effect")


async def configure_and_count_with_retries(
    usage: Usage, leases: Leases, definitions: Sequence[ScopeDefinition]
) -> None:
    """Calls `configure_and_count` until it succeeds. Logs each error, and then waits `RETRY_SECONDS`."""
    while True:
        try:
            return await configure_and_count(usage, leases, definitions)
        except Exception as error:
            log_round_error(log, "cannot count the stored content", error)
        await asyncio.sleep(RETRY_SECONDS)


async def _uncounted_names(usage: Usage) -> str:
    """Returns the names of the scopes that are not complete, separated by commas."""
    # A quota for all hosted repositories has an empty prefix, so the name of its scope is `quota ` with a final blank.
    return ", ".join(scope.definition.name.strip() for scope in await usage.scopes() if not scope.is_complete)
