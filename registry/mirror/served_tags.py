"""Decides which digest is served for a mirrored tag (`ServedTags`).

A tag *moves* when the upstream makes it point at another digest. For a *frozen* tag, the mirror serves one digest, even
if the tag moves.
A *cooldown* delays the moves of a tag: pulls get the new digest only after the cooldown (`registry.mirror.cooldown`).
Until then, the cooldown *holds back* the new digest.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from fnmatch import fnmatchcase
from typing import Final

from registry.config import DOCKER_HUB, HUB_LIBRARY, Upstream, format_duration
from registry.mirror.cooldown import TagChoice, add_sighting, choose_digest
from storage.content import Descriptor
from storage.errors import Denied, StorageFailed, StorageFull
from storage.human_text import utc_text
from storage.names import Digest, Reference, RepositoryName, Tag
from storage.patterns import NamePattern
from storage.upstream_tags import FrozenTag, Sighting, TagFrozen, UpstreamTagMove, UpstreamTags

log = logging.getLogger("registry.mirror")

_TAG_OF_DIGEST: Final = re.compile(r"sha(256-[0-9a-f]{64}|512-[0-9a-f]{128})(\.[a-zA-Z0-9._-]+)?")
"""Matches tags that are named after a digest, such as the fallback tag of the OCI spec ("Referrers Tag Schema"). Such a
tag points at content about the manifest with this digest, such as signatures."""
_MOVES_PER_READ: Final = 100
"""Largest number of tag moves that one read of the store returns. Other tasks run after each read: otherwise, many
moves that are skipped (of other upstreams and of exempt tags) would block the event loop."""


class ServedTags:
    """Applies the cooldown and the frozen tags of one upstream. A *sighting* records when the mirror first saw a tag
    point at a digest."""

    def __init__(
        self,
        tags: UpstreamTags,
        settings: Upstream,
        clock: Callable[[], float],
        random_number: Callable[[], float] = random.random,
    ) -> None:
        """`clock` returns seconds since 1970. `random_number` returns a number from 0 to 1."""
        self._tags = tags
        self._settings = settings
        self._clock = clock
        self._random_number = random_number
        # Whether the first digest that the mirror sees for a tag may be served at once.
        self._serves_first_digest = settings.cooldown_new == "serve"
        exemptions = [entry.partition(":") for entry in settings.cooldown_exempt]
        self._exemptions = [(NamePattern(repository), tag or "*") for repository, _, tag in exemptions]

    def cooldown(self, repo: RepositoryName, tag: Tag) -> float:
        """Returns the cooldown of a tag in seconds; 0.0: the tag has no cooldown. A tag that is named after a digest
        has no cooldown, because a signature must be available as soon as the signed manifest."""
        settings = self._settings
        if (
            not settings.cooldown
            or _TAG_OF_DIGEST.fullmatch(tag)
            or not any(fnmatchcase(tag, pattern) for pattern in settings.cooldown_tags)
        ):
            return 0.0
        names: set[str] = {repo, repo.removeprefix(f"{settings.name}/")}
        if settings.name == DOCKER_HUB:
            # Users write `ubuntu` for `library/ubuntu`.
            names |= {name.removeprefix(f"{HUB_LIBRARY}/") for name in names}
        for pattern, tag_pattern in self._exemptions:
            if fnmatchcase(tag, tag_pattern) and any(map(pattern.matches, names)):
                return 0.0
        return settings.cooldown

    async def find_frozen_tag(self, repo: RepositoryName, tag: Tag) -> FrozenTag | None:
        """Returns the frozen tag, with its digest; None: the tag is not frozen."""
        return await self._tags.find_frozen_tag(repo, tag)

    async def check_not_frozen(self, repo: RepositoryName, reference: Reference) -> None:
        """Raises TagFrozen if `reference` is a frozen tag, or if it is the digest of a manifest or blob that a frozen
        tag of the repository needs."""
        if isinstance(reference, Digest):
            frozen = await self._tags.frozen_tag_that_needs(repo, reference)
        else:
            frozen = await self._tags.find_frozen_tag(repo, reference)
        if frozen is not None:
            raise TagFrozen(
                f"{frozen} is frozen at {frozen.digest}, which the upstream may no longer have; unfreeze it first: "
                f"entrepot mirror unfreeze {frozen}"
            )

    async def choose(
        self,
        repo: RepositoryName,
        tag: Tag,
        find_cached: Callable[[RepositoryName, Tag], Awaitable[Descriptor | None]] | None = None,
    ) -> TagChoice | None:
        """Returns which digests may be served for a tag that is not frozen. Returns None in two cases:

        - The tag has no cooldown.
        - The mirror has no sighting of the tag, and the tag is not cached.

        `find_cached`: returns the descriptor of the manifest of a cached tag, or None if the tag is not cached. Without
        `find_cached`, the tag counts as not cached."""
        cooldown = self.cooldown(repo, tag)
        if not cooldown:
            return None
        now = self._clock()
        sightings = await self._tags.sightings(repo, tag)
        if not sightings:
            # A cached tag has no sighting if the sighting could not be recorded, for example because the disk was full.
            cached = await find_cached(repo, tag) if find_cached else None
            if cached is None:
                return None
            sightings = [Sighting(now, cached.digest)]
        return choose_digest(sightings, cooldown, now, serves_new=self._serves_first_digest)

    def digest_during_cooldown(self, repo: RepositoryName, tag: Tag, sightings: Sequence[Sighting]) -> Digest | None:
        """Returns the digest that is served while the cooldown holds back the newest one. Returns None if the newest
        digest is not held back, or if no digest may be served yet. Can be called in any thread."""
        cooldown = self.cooldown(repo, tag)
        if not cooldown or not sightings:
            return None
        choice = choose_digest(sightings, cooldown, self._clock(), serves_new=self._serves_first_digest)
        return None if choice.newest_held_back_until is None else next(iter(choice.candidates), None)

    async def moves_of_young_tags(self, after: UpstreamTagMove | None = None) -> AsyncGenerator[UpstreamTagMove, None]:
        """Yields the last move of each *young* tag of this upstream, oldest move first. A tag is young if it has
        pointed at its newest digest for less than its cooldown. With `after`, first yields the moves that are newer
        than `after`, and then the other moves, from the oldest move to `after`."""
        now = self._clock()
        oldest = now - self._settings.cooldown
        start = after if after is not None and oldest <= after.since < now else None
        # Each pass reads the moves after a position, up to an end. A move is a tuple that begins with its time, and
        # Python compares tuples item by item. So the end `(now,)` is greater than every move from before `now`, and
        # less than every move from `now` on. It excludes the moves that are recorded during this call.
        passes: list[tuple[UpstreamTagMove | None, tuple[object, ...]]] = [(start, (now,))]
        if start is not None:
            passes.append((None, start))
        for position, end in passes:
            while moves := [move for move in await self._tags.moves(oldest, position, _MOVES_PER_READ) if move <= end]:
                position = moves[-1]
                for move in moves:
                    if await self._is_last_move_of_tag_with_cooldown(move):
                        yield move
                await asyncio.sleep(0)

    async def pick_random_move(self) -> UpstreamTagMove | None:
        """Returns a random one of this upstream's tag moves that are younger than the upstream's cooldown. All these
        moves have the same probability. Returns None if there are none."""
        oldest = self._clock() - self._settings.cooldown
        position, chosen, count = None, None, 0
        while moves := await self._tags.moves(oldest, position, _MOVES_PER_READ):
            for move in moves:
                if move.repository.startswith(f"{self._settings.name}/"):
                    count += 1
                    if self._random_number() * count < 1:  # reservoir sampling: true with probability 1 / count
                        chosen = move
            position = moves[-1]
            await asyncio.sleep(0)
        return chosen

    async def _is_last_move_of_tag_with_cooldown(self, move: UpstreamTagMove) -> bool:
        """Returns whether `move` is the last move of its tag, the tag belongs to this upstream, and the tag has a
        cooldown. Does not check the age of the move."""
        since, repo, tag = move
        if not repo.startswith(f"{self._settings.name}/") or not self.cooldown(repo, tag):
            return False
        sightings = await self._tags.sightings(repo, tag)
        return bool(sightings) and sightings[-1].since == since

    async def record_sighting(self, repo: RepositoryName, tag: Tag, digest: Digest, cached: Descriptor | None) -> None:
        """Records that the upstream's tag points at `digest` now. Also records tags without a cooldown, because a
        cooldown may be set later. If the sighting cannot be stored, logs a warning and raises nothing. `cached`:
        descriptor of the manifest of the cached tag; None: the tag is not cached. The caller holds the lease (a lock
        across all processes) of the tag."""
        sightings = await self._tags.sightings(repo, tag)
        now, cooldown = self._clock(), self.cooldown(repo, tag)
        if not sightings and cached is not None and cached.digest != digest:
            # The cached digest counts as the first digest of the tag. Otherwise `digest` would be the first
            # digest, which the settings may allow to be served at once, without the cooldown.
            sightings = [Sighting(now, cached.digest)]
        updated = add_sighting(sightings, digest, now, cooldown, serves_new=self._serves_first_digest)
        if updated is sightings:
            return
        try:
            await self._tags.save_sightings(repo, tag, updated)
        except (StorageFull, StorageFailed) as error:
            log.warning("cannot record what %s:%s points at: %s", repo, tag, error.message)
            return
        choice = choose_digest(updated, cooldown, now, serves_new=self._serves_first_digest)
        if choice.newest_held_back_until is not None:
            log.info("%s", self.cooldown_notice(repo, tag, choice))

    def cooldown_refusal(self, repo: RepositoryName, tag: Tag, choice: TagChoice) -> Denied:
        """Returns the error for a pull of a tag for which no digest may be served yet."""
        assert choice.newest_held_back_until is not None
        return Denied(
            f"{repo}:{tag} is new here, and the cooldown of {self._duration} holds it back: {choice.newest} is served "
            f"from {time_text(choice.newest_held_back_until)} on; until then, pull it by digest",
            {"tag": f"{repo}:{tag}", "digest": choice.newest, "from": time_text(choice.newest_held_back_until)},
        )

    def cooldown_notice(self, repo: RepositoryName, tag: Tag, choice: TagChoice) -> str | None:
        """Returns a text that tells the client until when the newest digest of the tag is held back; None: the newest
        digest is not held back."""
        if choice.newest_held_back_until is None:
            return None
        return (
            f"{repo}:{tag} points at {choice.newest} at {self._settings.name}, which the cooldown of {self._duration} "
            f"holds back until {time_text(choice.newest_held_back_until)}"
        )

    @property
    def _duration(self) -> str:
        return format_duration(self._settings.cooldown)


def frozen_notice(frozen: FrozenTag) -> str:
    """Returns a text that tells the client that a tag is frozen, at which digest, and since when."""
    return f"{frozen} is frozen at {frozen.digest} since {time_text(frozen.at)}"


def time_text(unix_seconds: float) -> str:
    """Returns a time as text in UTC, rounded up to a whole second. If a digest is held back until `unix_seconds`, it
    is no longer held back at the time in the text."""
    return utc_text(math.ceil(unix_seconds))
