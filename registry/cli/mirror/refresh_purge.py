"""Handles one image reference for `entrepot mirror refresh` and `entrepot mirror purge`. The functions call
`registry.upkeep.cached_content` and return the text to print."""

from __future__ import annotations

import time
from pathlib import Path

from registry.cli.data_owner import operator_actor
from registry.cli.output import human_size, local_time, plural
from registry.config import format_duration
from registry.mirror.served_tags import time_text
from registry.router import Router
from registry.upkeep.cached_content import RefreshOutcome, RefreshResult, purge_image, refresh_image
from storage.names import ImageReference
from storage.store.stored_registry import StoredRegistry
from storage.upstream_tags import TagFrozen


async def refresh_reference(router: Router, stored: StoredRegistry, image: ImageReference) -> str:
    """Refreshes the cached content of an image.

    - For a tag, asks the upstream (the mirrored registry) what the tag points at now. Does not ask about a *frozen*
      tag, which stays at one digest.
    - For a digest, fetches the manifest if the manifest is not cached.
    - Unblocks the blobs of the image. If a URL of the upstream has sent corrupt bytes for a blob, the blob is *blocked*
      at this URL: the mirror does not request the blob from this URL.

    Returns the result as a text for the user, with the number of unblocked blobs, and with the end of the digest's
    *cooldown* (a delay before a new digest is served). Raises the errors of `refresh_image`."""
    result = await refresh_image(router, stored, image)
    text = _refresh_text(result)
    if result.held_back_until is not None:
        until = f"the upstream's digest is held back until {time_text(result.held_back_until)}"
        text = f"{text}; {until}, and {result.served or 'nothing'} is served"
    if not result.unblocked_blobs:
        return text
    blobs = plural(result.unblocked_blobs, "blob")
    return f"{text}; unblocked {blobs}, for which the upstream had sent corrupt bytes"


def _refresh_text(result: RefreshResult) -> str:
    match result.outcome:
        case RefreshOutcome.NEW:
            return f"new here: {result.digest}"
        case RefreshOutcome.UNCHANGED:
            return f"unchanged: {result.digest}"
        case RefreshOutcome.CHANGED:
            return f"changed: {result.before} -> {result.digest}"
        case RefreshOutcome.CACHED:
            return "cached; the content of a digest never changes"
        case RefreshOutcome.FETCHED_LATER:
            return "the next pull fetches it"
        case RefreshOutcome.FROZEN:
            assert result.frozen is not None
            since = local_time(result.frozen.at)
            return f"frozen at {result.digest} since {since}, so {result.upstream} was not asked"


async def purge_reference(
    router: Router,
    stored: StoredRegistry,
    image: ImageReference,
    *,
    data: Path,
    grace: float,
    everything: bool,
    force: bool = False,
) -> str:
    """Deletes the cached tags and manifests of an image; with `everything`, those of its whole repository. Returns the
    result as a text for the user. `grace`: the number of seconds after which garbage collection may delete the blobs.
    The other parameters and the errors are those of `purge_image`."""
    by = operator_actor()
    try:
        result = await purge_image(router, stored, image, data=data, by=by, everything=everything, force=force)
    except TagFrozen as error:
        raise TagFrozen(f"{error.message}; to drop the cached copy anyway, add --force") from None
    dropped = f"dropped {plural(result.tags, 'tag')} and {plural(result.manifests, 'manifest')}"
    if not result.size:
        return f"{dropped}; no space will be freed, because other content uses all their blobs"
    return (
        f"{dropped}; {human_size(result.size)} are freed after {local_time(time.time() + grace)} "
        f"(gc.grace is {format_duration(grace)}), unless a pull uses the blobs before then"
    )
