"""Scheduled warming: one server process warms the references of the settings at an interval."""

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
"""Longest time from the start to the first round. The start itself contacts no upstream."""
TAKEOVER_POLL_SECONDS = 15.0
"""Time between two checks whether the process that warms has ended."""
log = logging.getLogger("registry.mirror.warm")


class WarmLog(WarmObserver):
    """Logs the result of each reference."""

    def on_blob_wanted(self, where: ImageReference, blob: Descriptor) -> None: ...

    def on_bytes(self, blob: Digest, count: int) -> None: ...

    def on_reference_done(self, where: ImageReference, warmed: WarmResult) -> None:
        if warmed.error:
            log.warning("%s is not completely cached: %s", where, warmed.error)
        elif warmed.fetched:
            log.info(
                "%s is cached: %d bytes were fetched, %d were cached before",
                where,
                warmed.fetched,
                warmed.already_stored,
            )


@asynccontextmanager
async def warm_on_schedule(
    settings: WarmSettings, locate: Locate, find_stored: FindStored, leases: Leases
) -> AsyncIterator[None]:
    """Warms what `settings` name while the block runs. Every worker calls this; one at a time warms, and another one
    takes over when it ends."""
    if not settings.references and settings.file is None:
        yield
        return
    rounds = asyncio.create_task(_rounds(settings, locate, find_stored, leases))
    try:
        yield
    finally:
        await cancel_and_wait([rounds])


async def _rounds(settings: WarmSettings, locate: Locate, find_stored: FindStored, leases: Leases) -> None:
    await asyncio.sleep(min(FIRST_ROUND_SECONDS, settings.interval))
    while True:
        try:
            async with leases.try_slot(WARM_SLOT, 1) as ours:
                while ours:
                    await _round(settings, locate, find_stored)
                    await asyncio.sleep(settings.interval)
        except StorageFailed as error:
            log.warning("cannot take the lease for warming: %s", error.message)
        await asyncio.sleep(min(TAKEOVER_POLL_SECONDS, settings.interval))


async def _round(settings: WarmSettings, locate: Locate, find_stored: FindStored) -> None:
    try:
        listed = read_references(settings.file) if settings.file else []
        places = parse_references([*settings.references, *listed])
        await Warmer(locate, find_stored, parse_platforms(settings.platforms), WarmLog()).warm(places)
    except ReferencesError as error:
        log.warning("nothing is warmed: %s", error)
    except Exception:  # keeps the loop alive: the next round may succeed
        log.exception("warming failed")
