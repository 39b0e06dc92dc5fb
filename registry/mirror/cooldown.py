"""Decides which digest of a mirrored tag is served while a *cooldown* delays moves of the tag. A tag moves when the
upstream makes it name another digest.

A *sighting* records the digest of an upstream's tag, and the time at which the mirror saw that the tag was new or had
moved to this digest. The digest *holds* the tag until the next sighting: the mirror assumes that the tag names this
digest. A digest is *mature* if it has once held the tag without interruption for at least the cooldown. The newest
mature digest is served. So a move of the tag takes effect after the cooldown, if the tag has not moved again by then. A
move back to a mature digest takes effect immediately.

A new tag has no mature digest at first. With `cooldown_new = "serve"`, the first digest that the mirror saw counts as
mature. With `"refuse"`, the tag is not served until it has a mature digest.

The functions are pure: they depend on their arguments only. Times are seconds since 1970.
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
"""Shortest time between two sightings of a tag: their times must increase."""
_CLOCK_TOLERANCE_SECONDS: Final = 1.0
"""A sighting that lies more than this many seconds in the future was recorded before the clock was set back."""


@dataclass(frozen=True, slots=True)
class TagChoice:
    """What is served for a tag.

    - `candidates`: the digests that may be served, newest first; empty if no digest may be served yet. The first one is
      served. The others are served only if the first one cannot be fetched.
    - `newest`: the digest that the upstream's tag points at, as far as the mirror knows.
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
    """Returns the sightings of a tag after the upstream said at `now` that it points at `digest`. Returns `sightings`
    itself if they need no change.

    Keeps at most `MAX_SIGHTINGS`, and always the sighting that makes the served digest mature. `cooldown`,
    `serves_new`: see `choose_digest`."""
    past_sightings = _without_future(sightings, now)
    if past_sightings and past_sightings[-1].digest == digest:
        return past_sightings
    since = max(now, past_sightings[-1].since + _MIN_GAP_SECONDS) if past_sightings else now
    return _pruned([*past_sightings, Sighting(since, digest)], cooldown, now, serves_new=serves_new)


def _without_future(sightings: Sequence[Sighting], now: float) -> Sequence[Sighting]:
    """Corrects the times of sightings from the future, which were recorded before the clock was set back. Without the
    correction, their digests would become mature much too late. Returns the sightings in the same order. The time of
    each sighting from the future becomes `now`, or slightly later, because the times must increase. Returns `sightings`
    itself if none is from the future."""
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
    the newest sightings.

    An immature digest never becomes mature when sightings are dropped:

    - If a sighting is dropped, the digest of the sighting before it seems to have held the tag for longer. In the
      result, this can concern only the first sighting. Its digest is the served one, which is mature already.
    - With `serves_new`, the digest of the first sighting counts as mature. In the result, this is the served digest.
    """
    if len(sightings) <= MAX_SIGHTINGS:
        return sightings
    served = choose_digest(sightings, cooldown, now, serves_new=serves_new).candidates[:1]
    if not cooldown or not served:
        return sightings[-MAX_SIGHTINGS:]
    end_times = [*(newer.since for newer in sightings[1:]), now]
    # If no sighting of the served digest lasted long enough, this digest is served because it is the first digest that
    # the mirror saw (`serves_new`). The sighting at index 0 is then kept.
    last_mature_index = max(
        (
            index
            for index, (sighting, end_time) in enumerate(zip(sightings, end_times, strict=True))
            if sighting.digest == served[0] and end_time - sighting.since >= cooldown
        ),
        default=0,
    )
    return [sightings[last_mature_index], *sightings[last_mature_index + 1 :][-(MAX_SIGHTINGS - 1) :]]
