"""The page about an image, an index or another artifact. A tag or a digest names the artifact.

The path of this page ends with `NAME:TAG` or `NAME@DIGEST`, as in a pull command. The path of the page about a
repository ends with `NAME`. A repository name contains neither `:` nor `@`, so the paths of the two pages differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final
from urllib.parse import quote

from fastapi import Request, Response

from registry.browse.models import SizePart
from registry.ui.languages import translatable
from registry.ui.page_route import caller_of, image_host, page_response, page_slot, query_of
from registry.ui.visitor_rights import find_visitor_rights
from storage.errors import DigestInvalid, ManifestUnknown, NameInvalid, NameUnknown, TagInvalid
from storage.names import Digest, Reference, RepositoryName, Tag

STEPS_ON_A_PAGE: Final = 200
"""Largest number of build steps of an image that the page shows."""
PURPOSE_NAMES: Final = {
    "signature": translatable("Signatures"),
    "sbom": translatable("Lists of contents (SBOM)"),
    "attestation": translatable("Attestations"),
    "other": translatable("Other artifacts"),
}
"""The text on the page for each purpose (`registry.browse.artifact_types.Purpose`) of a referrer. A *referrer* is an
artifact that refers to the image."""


@dataclass(frozen=True, slots=True)
class BarSegment:
    """A segment of the bar that shows what makes up an image's size. `part`: the part of the
    size that the segment stands for. `start` and `width` are in thousandths of the bar's width."""

    part: SizePart
    start: float
    width: float


def parse_path(path: str) -> tuple[RepositoryName, Reference | None]:
    """Returns the repository in a path `NAME`, `NAME:TAG` or `NAME@DIGEST`, and the tag or digest (None for `NAME`).
    Raises NameUnknown if the name is not valid, and ManifestUnknown if the tag or digest is not valid."""
    name, at, digest = path.partition("@")
    name, colon, tag = (name, "", "") if at else path.partition(":")
    try:
        return RepositoryName(name), Digest(digest) if at else Tag(tag) if colon else None
    except NameInvalid:
        raise NameUnknown("there is no repository with this name") from None
    except (DigestInvalid, TagInvalid):
        raise ManifestUnknown("there is no such tag or digest") from None


def repository_in(path: str) -> RepositoryName:
    """Returns the repository in a path `NAME`. Raises one of two errors:

    - NameUnknown: the name is not valid, or a valid tag or digest follows the name.
    - ManifestUnknown: the name is valid, but a tag or digest that is not valid follows the name."""
    name, reference = parse_path(path)
    if reference is not None:
        raise NameUnknown("there is no repository with this name")
    return name


def path_of(name: RepositoryName, reference: Reference | None) -> str:
    """Returns the percent-encoded path of a page: `NAME:TAG` or `NAME@DIGEST`; `NAME` if `reference` is None."""
    return quote(image_name(name, reference), safe="/:@")


def image_name(name: RepositoryName, reference: Reference | None) -> str:
    """Returns the name of an image as in a pull command, but without the host. If `reference` is None, returns only the
    name of the repository."""
    if reference is None:
        return name
    return f"{name}{'@' if isinstance(reference, Digest) else ':'}{reference}"


async def image_page(request: Request, name: RepositoryName, reference: Reference, upstream: str | None) -> Response:
    """Shows the image, index or artifact `reference` in a repository. `name`: the repository's name in the store; for
    mirrored content, it begins with the upstream's name. `upstream`: the name of the upstream; None: the repository is
    not mirrored. For an index, the query can have `platform`: the platform or digest of the image to show. Raises
    Unauthorized, NameUnknown, ManifestUnknown.

    A *slot* is the permit to render a page. Reading the content can take long, so this function acquires a slot only
    after it has read the content (`page_slot`). Therefore the route must be a `SlotlessRoute`, which acquires no slot
    for its handler."""
    caller, platform = caller_of(request), query_of(request).one("platform") or None
    context = caller.context_for(name)
    view = await caller.repository_browser.manifest(context, name, reference, platform)
    contents = await caller.repository_browser.files(context, name, reference) if view.kind == "artifact" else None
    referrers = await caller.repository_browser.referrers(context, name, reference)
    async with page_slot(request):
        return await page_response(
            request,
            "image.html",
            section="repositories",
            name=name,
            image_name=image_name(name, reference),
            upstream=upstream,
            view=view,
            referrers=referrers,
            contents=contents,
            bars=list(bar_segments(view.image.parts)) if view.image is not None else [],
            steps_on_a_page=STEPS_ON_A_PAGE,
            purpose_names=PURPOSE_NAMES,
            is_tag=isinstance(reference, Tag),
            is_immutable=isinstance(reference, Tag) and caller.repository_browser.is_immutable(name, reference),
            rights=await find_visitor_rights(caller, name),
            host=image_host(request),
            now=datetime.now(UTC),
        )


def bar_segments(parts: Sequence[SizePart]) -> Iterator[BarSegment]:
    """Yields the segments of the bar, from left to right: one for each part of the size."""
    total, start = sum(part.size for part in parts) or 1, 0
    for part in parts:
        yield BarSegment(part, round(1000 * start / total, 2), round(1000 * part.size / total, 2))
        start += part.size
