"""Looks regularly at *young* tags: mirrored tags that have moved within their cooldown (`watch_young_tags`). The
cooldown is the time for which a moved tag is still served at its older digest.

Without these checks, the mirror would learn that an upstream's tag has moved only when a client pulls the tag. Suppose
that a pull shows a move to a bad digest, that the upstream moves the tag back after an hour, and that nobody pulls the
tag for some days. The mirror would believe that the tag still points at the bad digest, and would serve this digest
after the cooldown. So one server process asks the upstream about young tags, one after the other, in *rounds*. Each
upstream has rounds of its own, so that an upstream that does not answer delays only its own rounds.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Final

from registry.mirror.mirror import Mirror
from registry.single_flight import cancel_and_wait
from storage.background_rounds import run_in_one_process
from storage.errors import RegistryError
from storage.leases import Leases

WATCH_SLOT: Final = "cooldown"
"""Name of the slot (a permit) that the watching process holds. Only one process at a time can hold it."""
ROUNDS_PER_COOLDOWN: Final = 20
"""Number of rounds within the shortest cooldown, unless `MIN_INTERVAL_SECONDS` or `MAX_INTERVAL_SECONDS` changes the
interval. The mirror notices a move at the next round, about a twentieth of the shortest cooldown later at most."""
MIN_INTERVAL_SECONDS: Final = 60.0
"""Shortest time between two rounds."""
MAX_INTERVAL_SECONDS: Final = 3600.0
"""Longest time between two rounds."""
FIRST_ROUND_SECONDS: Final = 60.0
"""Longest time until the first round of a process. Each reload of the settings starts this time again. If it were
`MAX_INTERVAL_SECONDS`, a server that reloads its settings more than once an hour would never run a round."""
TAKEOVER_POLL_SECONDS: Final = 15.0
"""Longest time between two attempts of a process to become the watching process."""
log = logging.getLogger("registry.mirror")


def round_interval(cooldowns: Iterable[float]) -> float:
    """Returns the time between two rounds in seconds. `cooldowns`: the cooldowns of the mirrors in seconds."""
    return min(max(min(cooldowns) / ROUNDS_PER_COOLDOWN, MIN_INTERVAL_SECONDS), MAX_INTERVAL_SECONDS)


@asynccontextmanager
async def watch_young_tags(mirrors: Sequence[Mirror], interval: float, leases: Leases) -> AsyncIterator[None]:
    """Runs the rounds of each mirror in the background while the `async with` block runs. The first round starts after
    at most `FIRST_ROUND_SECONDS`, and each further one `interval` seconds after the end of the one before. Every server
    process calls this, but only one of them at a time asks the upstreams. `mirrors`: the mirrors with a cooldown."""
    task = asyncio.create_task(_run_rounds(mirrors, interval, leases))
    try:
        yield
    finally:
        await cancel_and_wait([task])


async def _run_rounds(mirrors: Sequence[Mirror], interval: float, leases: Leases) -> None:
    """Waits until this process can become the watching process, and then runs the rounds of all mirrors side by side.
    Ends only when it is cancelled."""

    async def run_rounds_of_all() -> None:
        await asyncio.gather(*(_run_rounds_of(mirror, interval) for mirror in mirrors))

    await run_in_one_process(
        leases,
        WATCH_SLOT,
        run_rounds_of_all,
        lambda: asyncio.sleep(min(TAKEOVER_POLL_SECONDS, interval)),
        log=log,
        what_failed="cannot find out whether another process looks at young tags",
    )


async def _run_rounds_of(mirror: Mirror, interval: float) -> None:
    """Runs the rounds of one mirror: the first one after at most `FIRST_ROUND_SECONDS`, and each further one `interval`
    after the end of the one before. Ends only when it is cancelled."""
    seconds = min(FIRST_ROUND_SECONDS, interval)
    while True:
        await asyncio.sleep(seconds)
        await _run_round(mirror)
        seconds = interval


async def _run_round(mirror: Mirror) -> None:
    """Asks one upstream about its young tags. Logs errors, and raises nothing."""
    try:
        await mirror.recheck_young_tags()
    except RegistryError as error:
        log.info(
            "this round did not check all tags that moved within the cooldown: %s; the next round continues after the "
            "last tag that was checked",
            error.message,
        )
    except Exception:  # does not end the rounds, because the next round may succeed
        log.exception("looking at young tags failed; the next round tries again")
