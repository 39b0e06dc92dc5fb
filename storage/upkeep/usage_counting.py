"""Counts the blobs, bytes and tags of *usage scopes* (sets of repositories) in the background, after the scopes in the
server's settings have changed (`count_scopes`)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Final

from storage.background_rounds import log_round_error
from storage.leases import Leases
from storage.usage import ScopeDefinition, Usage

COUNTING_SLOT: Final = "usage counting"
"""Name of the slot (a permit that one process at a time can hold) for counting."""
PAUSE_SECONDS: Final = 0.005
"""Seconds between two batches. A push or another change of the store can run in this pause, so it does not wait for
many batches."""
RETRY_SECONDS: Final = 30.0
"""Seconds until a process tries again after an error of the store."""
log = logging.getLogger("storage.usage")


async def count_scopes(usage: Usage, leases: Leases, definitions: Sequence[ScopeDefinition]) -> None:
    """Replaces the stored scopes by `definitions` and counts their content, in one process at a time. Returns when all
    scopes are *complete*: their content is counted. If the process dies, the next process that calls this function
    continues the count. Raises StorageFull, StorageFailed.

    Only servers call this function. A command may have other settings than the server. Its call would remove the
    scopes that its settings lack, and the quotas and cache budgets of these scopes would have no effect any more."""
    async with leases.slot(COUNTING_SLOT, count=1):
        await usage.configure(definitions)
        await _count(usage)


async def complete_counts(usage: Usage, leases: Leases) -> None:
    """Returns when the scopes that a server has defined are complete. If another process counts them, waits for it;
    otherwise, continues the count. Changes no scope's definition. Raises StorageFull, StorageFailed."""
    async with leases.slot(COUNTING_SLOT, count=1):
        await _count(usage)


async def _count(usage: Usage) -> None:
    """Counts until all scopes are complete."""
    is_logged = False
    while await usage.count_batch():
        if not is_logged and (names := await _uncounted_names(usage)):
            log.info("counting what is stored for: %s; until that is done, their limits have no effect", names)
            is_logged = True
        await asyncio.sleep(PAUSE_SECONDS)
    if is_logged:
        log.info("counted what is stored; all limits are in effect")


async def count_scopes_with_retries(usage: Usage, leases: Leases, definitions: Sequence[ScopeDefinition]) -> None:
    """Does the same as `count_scopes`, but raises no error: logs it, and tries again later until `count_scopes` has
    succeeded."""
    while True:
        try:
            return await count_scopes(usage, leases, definitions)
        except Exception as error:
            log_round_error(log, "cannot count the stored content", error)
        await asyncio.sleep(RETRY_SECONDS)


async def _uncounted_names(usage: Usage) -> str:
    """Returns the names of the scopes that are not complete, separated by commas."""
    # A quota for all hosted repositories has an empty prefix, so the name of its scope is `quota ` with a final blank.
    return ", ".join(scope.definition.name.strip() for scope in await usage.scopes() if not scope.is_complete)
