"""Regularly asks the upstreams about *young* tags: mirrored tags that have moved within their cooldown
(`watch_young_tags`). The *cooldown* is the time for which the mirror still serves a moved tag at its older digest.

The checks find out whether the upstream has moved a young tag again, for example away from a bad digest. Without them,
the mirror would notice this move only when a client pulls the tag, and could serve the bad digest after the cooldown.

One server process, the *watching* process, makes the checks. In one *round*, it asks one upstream about its young tags,
one after the other. An upstream that does not answer delays only its own rounds.
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
"""Name of the slot that the watching process holds. A *slot* is a permit that one process at a time can hold."""
ROUNDS_PER_COOLDOWN: Final = 20
"""The interval between rounds is the shortest cooldown divided by this number, but at least `MIN_INTERVAL_SECONDS` and
at most `MAX_INTERVAL_SECONDS`."""
MIN_INTERVAL_SECONDS: Final = 60.0
"""Shortest interval between rounds."""
MAX_INTERVAL_SECONDS: Final = 3600.0
"""Longest interval between rounds."""
FIRST_ROUND_SECONDS: Final = 60.0
"""Longest wait before the first round of a process. Each reload of the settings starts this wait anew. The wait is
short, so that a server that often reloads its settings still runs rounds."""
TAKEOVER_POLL_SECONDS: Final = 15.0
"""Longest time between two attempts to become the watching process."""
log = logging.getLogger("registry.mirror")


def round_interval(cooldowns: Iterable[float]) -> float:
    """Returns the interval between rounds in seconds. `cooldowns`: the cooldowns of the mirrors in seconds, at least
    one."""
    return min(max(min(cooldowns) / ROUNDS_PER_COOLDOWN, MIN_INTERVAL_SECONDS), MAX_INTERVAL_SECONDS)


@asynccontextmanager
async def watch_young_tags(mirrors: Sequence[Mirror], interval: float, leases: Leases) -> AsyncIterator[None]:
    """Runs the rounds of all mirrors in the background while the `async with` block runs. Every server process calls
    this function, but only the watching process runs rounds. `mirrors`: the mirrors with a cooldown. `interval`: the
    seconds between the end of a mirror's round and the start of its next round."""
    task = asyncio.create_task(_run_rounds_in_one_process(mirrors, interval, leases))
    try:
        yield
    finally:
        await cancel_and_wait([task])


async def _run_rounds_in_one_process(mirrors: Sequence[Mirror], interval: float, leases: Leases) -> None:
    """Waits until this process becomes the watching process, and then runs the rounds of all mirrors concurrently. Ends
    only when it is cancelled."""

    async def run_all_mirrors() -> None:
        await asyncio.gather(*(_run_rounds_of_mirror(mirror, interval) for mirror in mirrors))

    await run_in_one_process(
        leases,
        WATCH_SLOT,
        run_all_mirrors,
        lambda: asyncio.sleep(min(TAKEOVER_POLL_SECONDS, interval)),
        log=log,
        what_failed="cannot find out whether another process looks at young tags",
    )


async def _run_rounds_of_mirror(mirror: Mirror, interval: float) -> None:
    """Runs the rounds of one mirror until it is cancelled. The first round starts after `FIRST_ROUND_SECONDS`, or after
    `interval` seconds if that is shorter."""
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
    except Exception:  # the next round may succeed
        log.exception("looking at young tags failed; the next round tries again")
