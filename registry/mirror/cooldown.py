"""Decides which digest is served for a mirrored tag with a *cooldown*: the time for which each move of the tag is
delayed. A tag *moves* when the upstream makes it point at another digest.

- A *sighting* records that the mirror has found a new tag, or a move of a tag: the tag's digest, and the time.
- A sighting *lasts* until the next sighting of the tag. The newest sighting lasts until now.
- A digest is *mature* if at least one of its sightings has lasted for the cooldown or longer. The newest mature digest
  is served. A move back to a mature digest takes effect immediately.

A new tag has no mature digest at first. With `cooldown_new = "serve"`, the first digest that the mirror saw counts as
mature. With `"refuse"`, the tag is not served until it has a mature digest.

Times are seconds since 1970.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from storage.names import Digest
from storage.upstream_tags import Sighting

MAX_SIGHTINGS: Final = 50
"""Largest number of sightings that are kept for one tag."""
_MIN_GAP_SECONDS: Final = 0.001
"""Shortest time between two sightings of a tag. No two sightings may have the same time."""
_CLOCK_TOLERANCE_SECONDS: Final = 1.0
"""A sighting is *from the future* if its time is more than this number of seconds after the present."""


@dataclass(frozen=True, slots=True)
class TagChoice:
    """What is served for a tag.

    - `candidates`: the digests that may be served, newest first; empty if no digest may be served yet. The first
      candidate is served. The others are served only if the first candidate cannot be fetched.
    - `newest`: the digest of the newest sighting.
    - `newest_held_back_until`: time at which `newest` becomes mature if the tag does not move again. None if `newest`
      is the first candidate."""

    candidates: tuple[Digest, ...]
    newest: Digest
    newest_held_back_until: float | None


def choose_digest(sightings: Sequence[Sighting], cooldown: float, now: float, *, serves_new: bool) -> TagChoice:
    """Returns which digest is served for a tag with these sightings. `sightings`: at least one, oldest first.
    `cooldown`: in seconds. `serves_new`: whether the digest of the first sighting counts as mature."""
    newest = sightings[-1]
    mature_digests = {older.digest for older, newer in pairwise(sightings) if newer.since - older.since >= cooldown}
    if now - newest.since >= cooldown:
        mature_digests.add(newest.digest)
    if serves_new:
        mature_digests.add(sightings[0].digest)
    candidates = tuple(
        dict.fromkeys(sighting.digest for sighting in reversed(sightings) if sighting.digest in mature_digests)
    )
    is_newest_served = candidates[:1] == (newest.digest,)
    return TagChoice(candidates, newest.digest, None if is_newest_served else newest.since + cooldown)


def add_sighting(
    sightings: Sequence[Sighting], digest: Digest, now: float, cooldown: float, *, serves_new: bool
) -> Sequence[Sighting]:
    """Adds a sighting if the tag is new or has moved: at the time `now`, the upstream said that the tag points at
    `digest`. Returns all sightings of the tag; `sightings` itself if nothing changes.

    Keeps at most `MAX_SIGHTINGS`, and always the sighting that makes the served digest mature. `cooldown`,
    `serves_new`: see `choose_digest`."""
    corrected = _with_corrected_times(sightings, now)
    if corrected and corrected[-1].digest == digest:
        return corrected
    since = max(now, corrected[-1].since + _MIN_GAP_SECONDS) if corrected else now
    return _pruned([*corrected, Sighting(since, digest)], cooldown, now, serves_new=serves_new)


def _with_corrected_times(sightings: Sequence[Sighting], now: float) -> Sequence[Sighting]:
    """Returns the sightings with corrected times, in the same order; `sightings` itself if none is from the future. A
    sighting from the future was recorded before the clock was set back. Its time becomes `now`, or slightly later,
    because no two sightings may have the same time. Uncorrected, its digest would become mature much too late."""
    if not sightings or sightings[-1].since <= now + _CLOCK_TOLERANCE_SECONDS:
        return sightings
    adjusted: list[Sighting] = []
    for sighting in sightings:
        since = min(sighting.since, now)
        adjusted.append(
            Sighting(max(since, adjusted[-1].since + _MIN_GAP_SECONDS) if adjusted else since, sighting.digest)
        )
    return adjusted


def _pruned(sightings: list[Sighting], cooldown: float, now: float, *, serves_new: bool) -> list[Sighting]:
    """Returns at most `MAX_SIGHTINGS` of the sightings: first the sighting that makes the served digest mature, then
    the newest sightings. If there is no cooldown or no digest is served, returns only the newest sightings.

    No digest becomes mature because sightings are left out:

    - If there is no cooldown, all digests are mature already.
    - If no digest is served, `serves_new` is False, and all sightings of the result last as long as before.
    - Otherwise, only the first sighting of the result can seem to last longer, because sightings after it may be left
      out. With `serves_new`, only its digest counts as mature. In both cases, its digest is the served digest, which is
      mature already."""
    if len(sightings) <= MAX_SIGHTINGS:
        return sightings
    served = choose_digest(sightings, cooldown, now, serves_new=serves_new).candidates[:1]
    if not cooldown or not served:
        return sightings[-MAX_SIGHTINGS:]
    end_times = [*(newer.since for newer in sightings[1:]), now]
    # If no sighting of the served digest lasted long enough, the digest is mature because it is the first digest that
    # the mirror saw (`serves_new`). Then the first sighting is kept: index 0.
    last_mature_index = max(
        (
            index
            for index, (sighting, end_time) in enumerate(zip(sightings, end_times, strict=True))
            if sighting.digest == served[0] and end_time - sighting.since >= cooldown
        ),
        default=0,
    )
    return [sightings[last_mature_index], *sightings[last_mature_index + 1 :][-(MAX_SIGHTINGS - 1) :]]
