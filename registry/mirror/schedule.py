"""Warms what the settings name, again and again, in one of the processes that serve."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from registry.config.warm import Warm
from registry.mirror.flights import end
from registry.mirror.platforms import parse_platforms
from registry.mirror.references import ReferencesError, parse_references, read_references
from registry.mirror.warm import Here, Locate, Warmed, Warmer, Watcher
from storage.content import Descriptor
from storage.errors import StorageFailed
from storage.interface import Turns
from storage.names import Digest, Location

TURN = "warm"
FIRST_ROUND = 60.0
"""Seconds after the start until the first round, at the most: a start asks no upstream anything."""
LOOK = 15.0
"""Seconds between two looks whether the process whose turn it was has died."""
log = logging.getLogger("registry.mirror.warm")


class Logged(Watcher):
    """Tells the log what came of each reference."""

    def expect(self, where: Location, blob: Descriptor) -> None: ...

    def reach(self, blob: Digest, count: int) -> None: ...

    def end(self, where: Location, warmed: Warmed) -> None:
        if warmed.error:
            log.warning("%s is not all here: %s", where, warmed.error)
        elif warmed.fetched:
            log.info("%s is here: %d bytes were fetched, %d were here before", where, warmed.fetched, warmed.kept)


@asynccontextmanager
async def warming(settings: Warm, locate: Locate, here: Here, turns: Turns) -> AsyncIterator[None]:
    """While the block runs, what `settings` name is warmed. All workers call it; one of them does it, and when that one
    dies, the next."""
    if not settings.references and settings.file is None:
        yield
        return
    rounds = asyncio.create_task(_rounds(settings, locate, here, turns))
    try:
        yield
    finally:
        await end([rounds])


async def _rounds(settings: Warm, locate: Locate, here: Here, turns: Turns) -> None:
    await asyncio.sleep(min(FIRST_ROUND, settings.interval))
    while True:
        try:
            async with turns.try_slot(TURN, 1) as ours:
                while ours:
                    await _round(settings, locate, here)
                    await asyncio.sleep(settings.interval)
        except StorageFailed as error:
            log.warning("whose turn it is to warm cannot be told: %s", error.message)
        await asyncio.sleep(min(LOOK, settings.interval))


async def _round(settings: Warm, locate: Locate, here: Here) -> None:
    try:
        listed = read_references(settings.file) if settings.file else []
        places = parse_references([*settings.references, *listed])
        await Warmer(locate, here, parse_platforms(settings.platforms), Logged()).warm(places)
    except ReferencesError as error:
        log.warning("nothing is warmed: %s", error)
    except Exception:  # the next round may do better, and nobody else would start it
        log.exception("warming was broken off")
