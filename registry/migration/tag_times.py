"""Estimates when imported tags were set at the *old registry*, from which they are imported (`OldRegistryTag`).
Retention needs these times to keep the newest tags of a repository."""

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
"""The beginning of 2001, in seconds since 1970. Earlier build times are ignored: reproducible builds state a fixed
time, such as 1970 or 1980."""
_CREATED_ANNOTATION: Final = "org.opencontainers.image.created"
"""The annotation with the time at which an image was built (OCI image spec, "Pre-Defined Annotation Keys")."""
_DIGITS: Final = re.compile("([0-9]+)")


TAG_STEP_SECONDS: Final = 1e-6
"""How much an estimate grows with each position, so that tags with the same build time get different times."""


@dataclass(frozen=True, slots=True)
class OldRegistryTag:
    """A tag of the old registry.

    - `listed_at`: when the old registry listed a batch of tags with this tag, in seconds since 1970.
    - `position`: the tag's index in the batch, from 0. The batch is sorted by `natural_sort_key`.
    - `count`: the number of tags in the batch."""

    repository: RepositoryName
    tag: Tag
    listed_at: float
    position: int
    count: int

    @classmethod
    def in_order(cls, repo: RepositoryName, tags: Iterable[Tag], listed_at: float) -> Iterator[OldRegistryTag]:
        """Yields a batch of tags, sorted by `natural_sort_key`. `listed_at`: when the old registry listed the batch, in
        seconds since 1970."""
        tags = sorted(tags, key=natural_sort_key)
        for position, tag in enumerate(tags):
            yield cls(repo, tag, listed_at, position, len(tags))

    async def estimate_time(self, store: StoredRegistry, manifest: Manifest) -> float:
        """Estimates when the tag was set at the old registry, in seconds since 1970. `manifest`: the manifest that the
        tag points at. This registry must already have the manifest in `repository`.

        - If the build time is known, the estimate is the build time, plus `TAG_STEP_SECONDS` for each earlier position.
        - Otherwise the estimate is just before `listed_at`, in the order of the positions."""
        built_at = await build_time(store, self.repository, manifest, self.listed_at)
        if built_at is None:
            return self.listed_at - (self.count - self.position) * TAG_STEP_SECONDS
        return built_at + self.position * TAG_STEP_SECONDS


async def build_time(store: StoredRegistry, repo: RepositoryName, manifest: Manifest, now: float) -> float | None:
    """Returns when an image was built, in seconds since 1970. A manifest states this time in its config, or else
    in an annotation. For an index, returns the newest time that the index or one of its manifests states. Ignores times
    before 2001 or after `now`. Returns None if no time is stated, or if all stated times are ignored. `repo` must
    already have the image."""
    times = []
    pending, seen = [manifest], {manifest.digest}
    while pending:
        current = pending.pop()
        times.append(await _stated_time(store, repo, current))
        for child in current.manifests:
            # Skips the digests in `blob_children`: they may be blobs, not manifests. An index of BuildKit's build
            # cache lists blobs.
            if child.digest in seen or len(seen) == MAX_MANIFESTS or child.digest in current.blob_children:
                continue
            seen.add(child.digest)
            try:
                pending.append(await store.get_manifest(repo, child.digest))
            except ManifestUnknown:  # not imported, or damaged
                continue
    return max((time for time in times if time is not None and _EARLIEST_BUILD <= time <= now), default=None)


def natural_sort_key(name: str) -> list[str | int]:
    """Returns the sort key of a name for the *natural order*, which compares numbers by their values: `build-9` sorts
    before `build-10`."""
    # The parts are text and digits in turn, beginning with text. So a comparison of two keys never compares text with a
    # number.
    return [int(part) if index % 2 else part for index, part in enumerate(_DIGITS.split(name))]


async def _stated_time(store: StoredRegistry, repo: RepositoryName, manifest: Manifest) -> float | None:
    """Returns the build time from the config of a manifest. If the config states none, returns the time from the
    manifest's annotation. Returns None if neither states a time."""
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
