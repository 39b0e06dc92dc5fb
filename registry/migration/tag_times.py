"""Estimates when tags were set at the *old registry*, whose content is imported, if the old registry does not state
these times (`OldRegistryTag`). Retention needs the times, because it keeps the newest tags of a repository. If all
imported tags had the time of the import, retention could not tell which of them are the newest."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final

from storage.content import MAX_IMAGE_CONFIG_BYTES, Descriptor, Manifest
from storage.errors import ManifestUnknown, RegistryError
from storage.image_times import parse_time
from storage.json_bounds import load_bounded
from storage.names import RepositoryName, Tag
from storage.store.stored_registry import StoredRegistry

MAX_MANIFESTS: Final = 100
"""Largest number of manifests that are read for one image, including the index."""
_EARLIEST_BUILD: Final = 978_307_200.0
"""The beginning of 2001, in seconds since 1970. Earlier build times are ignored, because reproducible builds state a
time such as 1970 or 1980 in place of the real time."""
_CREATED_ANNOTATION: Final = "org.opencontainers.image.created"
"""The annotation with the time at which an image was built (OCI image spec, "Pre-Defined Annotation Keys")."""
_DIGITS: Final = re.compile("([0-9]+)")


TAG_STEP_SECONDS: Final = 1e-6
"""Difference between the times of two tags that would have the same time otherwise."""


@dataclass(frozen=True, slots=True)
class OldRegistryTag:
    """A tag of the old registry. `listed_at`: when the old registry had listed the tag, in seconds since 1970. `count`:
    how many tags were listed at this time. `position`: the tag's position in the natural order of their names."""

    repository: RepositoryName
    tag: Tag
    listed_at: float
    position: int
    count: int

    @classmethod
    def in_order(cls, repo: RepositoryName, tags: Iterable[Tag], listed_at: float) -> Iterator[OldRegistryTag]:
        """Yields the tags in the natural order of their names."""
        tags = sorted(tags, key=natural_order)
        for position, tag in enumerate(tags):
            yield cls(repo, tag, listed_at, position, len(tags))

    async def estimate_time(self, store: StoredRegistry, manifest: Manifest) -> float:
        """Estimates when the tag was set at the old registry, in seconds since 1970. The estimate is the time at which
        the image was built or, if this time is not known, a time just before the tag was listed. Tags that would have
        the same time get times in the natural order of their names. `manifest`: the manifest that the tag points at.
        This registry must already have the manifest in `repository`."""
        built_at = await build_time(store, self.repository, manifest, self.listed_at)
        if built_at is None:
            return self.listed_at - (self.count - self.position) * TAG_STEP_SECONDS
        return built_at + self.position * TAG_STEP_SECONDS


async def build_time(store: StoredRegistry, repo: RepositoryName, manifest: Manifest, now: float) -> float | None:
    """Returns when an image was built, in seconds since 1970. A manifest states this time in its config, or else
    in an annotation. For an index, returns the newest time that the index or one of its manifests states. Ignores times
    before 2001 or after `now`. Returns None if no time is left. `repo` must already have the image."""
    times = []
    pending, seen = [manifest], {manifest.digest}
    while pending:
        current = pending.pop()
        times.append(await _stated_time(store, repo, current))
        for child in current.manifests:
            # `blob_children`: the entries that may be blobs. The indexes of BuildKit's build cache list blobs.
            if child.digest in seen or len(seen) == MAX_MANIFESTS or child.digest in current.blob_children:
                continue
            seen.add(child.digest)
            try:
                pending.append(await store.get_manifest(repo, child.digest))
            except ManifestUnknown:  # not imported, or damaged
                continue
    return max((time for time in times if time is not None and _EARLIEST_BUILD <= time <= now), default=None)


def natural_order(name: str) -> list[str | int]:
    """Returns a sort key that compares the numbers in names by their values, so that `build-9` sorts before
    `build-10`."""
    # The parts are text and digits in turn, beginning with text. So two keys never compare text with a number.
    return [int(part) if index % 2 else part for index, part in enumerate(_DIGITS.split(name))]


async def _stated_time(store: StoredRegistry, repo: RepositoryName, manifest: Manifest) -> float | None:
    """Returns the time that the config of a manifest, or else its annotation, states; None if neither states a time."""
    created = None if manifest.config is None else await _config_created(store, repo, manifest.config)
    time = parse_time(created) or parse_time((manifest.annotations or {}).get(_CREATED_ANNOTATION))
    return None if time is None else time.timestamp()


async def _config_created(store: StoredRegistry, repo: RepositoryName, config: Descriptor) -> object:
    """Returns the member `created` of a config; None if the config has no such member or cannot be read."""
    if not config.media_type.endswith("json"):
        return None
    try:
        async with aclosing(await store.open_blob(repo, config.digest)) as reader:
            if reader.descriptor.size > MAX_IMAGE_CONFIG_BYTES:  # the manifest may state a wrong size
                return None
            document = load_bounded(b"".join([bytes(piece) async for piece in reader]))
    except (RegistryError, ValueError, RecursionError):
        return None  # the image is imported anyway, with a worse estimate
    return document.get("created") if isinstance(document, dict) else None
