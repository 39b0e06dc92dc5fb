"""Warms what the settings name, again and again, in one of the processes that serve."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from registry.config.mirror_settings import WarmSettings
from registry.mirror.warm.targets import ReferencesError, parse_platforms, parse_references, read_references
from registry.mirror.warm.warmer import FindStored, Locate, Warmer, WarmObserver, WarmResult
from registry.single_flight import cancel_and_wait
from storage.content import Descriptor
from storage.errors import StorageFailed
from storage.leases import Leases
from storage.names import Digest, ImageReference

WARM_SLOT = "warm"
FIRST_ROUND_SECONDS = 60.0
"""Seconds after the start until the first round, at the most: a start asks no upstream anything."""
TAKEOVER_POLL_SECONDS = 15.0
"""Seconds between two looks whether the process whose turn it was has died."""
log = logging.getLogger("registry.mirror.warm")


class WarmLog(WarmObserver):
    """Tells the log what came of each reference."""

    def expect(self, where: ImageReference, blob: Descriptor) -> None: ...

    def reach(self, blob: Digest, count: int) -> None: ...

    def end(self, where: ImageReference, warmed: WarmResult) -> None:
        if warmed.error:
            log.warning("%s is not all here: %s", where, warmed.error)
        elif warmed.fetched:
            log.info("%s is here: %d bytes were fetched, %d were here before", where, warmed.fetched, warmed.kept)


@asynccontextmanager
async def warm_on_schedule(
    settings: WarmSettings, locate: Locate, here: FindStored, turns: Leases
) -> AsyncIterator[None]:
    """While the block runs, what `settings` name is warmed. All workers call it; one of them does it, and when that one
    dies, the next."""
    if not settings.references and settings.file is None:
        yield
        return
    rounds = asyncio.create_task(_rounds(settings, locate, here, turns))
    try:
        yield
    finally:
        await cancel_and_wait([rounds])


async def _rounds(settings: WarmSettings, locate: Locate, here: FindStored, turns: Leases) -> None:
    await asyncio.sleep(min(FIRST_ROUND_SECONDS, settings.interval))
    while True:
        try:
            async with turns.try_slot(WARM_SLOT, 1) as ours:
                while ours:
                    await _round(settings, locate, here)
                    await asyncio.sleep(settings.interval)
        except StorageFailed as error:
            log.warning("whose turn it is to warm cannot be told: %s", error.message)
        await asyncio.sleep(min(TAKEOVER_POLL_SECONDS, settings.interval))


async def _round(settings: WarmSettings, locate: Locate, here: FindStored) -> None:
    try:
        listed = read_references(settings.file) if settings.file else []
        places = parse_references([*settings.references, *listed])
        await Warmer(locate, here, parse_platforms(settings.platforms), WarmLog()).warm(places)
    except ReferencesError as error:
        log.warning("nothing is warmed: %s", error)
    except Exception:  # the next round may do better, and nobody else would start it
        log.exception("warming was broken off")
