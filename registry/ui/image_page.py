"""The page of what a tag or digest leads to: an image, an index or another artifact, in detail.

Its path ends with `NAME:TAG` or `NAME@DIGEST`, as in a pull command. No name of a repository contains `:` or `@`, so
the path cannot be that of a repository; and every tag has one, whatever words its repository's name consists of.
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
from registry.ui.page_route import caller_of, image_host, page_response, query_of
from registry.ui.visitor_rights import visitor_rights
from storage.errors import DigestInvalid, ManifestUnknown, NameInvalid, NameUnknown, TagInvalid
from storage.names import Digest, Reference, RepositoryName, Tag

STEPS_ON_A_PAGE: Final = 200
"""Of an image with more steps, only the first are shown."""
PURPOSE_NAMES: Final = {
    "signature": translatable("Signatures"),
    "sbom": translatable("Lists of contents (SBOM)"),
    "attestation": translatable("Attestations"),
    "other": translatable("Other artifacts"),
}
"""How the purposes of referrers are called (`registry.browse.artifact_types.Purpose`)."""


@dataclass(frozen=True, slots=True)
class SizeBar:
    """A part of the picture of an image's size. `start` and `width` are in thousandths of the whole."""

    part: SizePart
    start: float
    width: float


def parse_path(path: str) -> tuple[RepositoryName, Reference | None]:
    """Returns the repository in a path `NAME`, `NAME:TAG` or `NAME@DIGEST`, and the tag or digest. Raises NameUnknown
    and ManifestUnknown if there can be no such thing."""
    name, at, digest = path.partition("@")
    name, colon, tag = (name, "", "") if at else path.partition(":")
    try:
        return RepositoryName(name), Digest(digest) if at else Tag(tag) if colon else None
    except NameInvalid:
        raise NameUnknown("there is no repository with this name") from None
    except (DigestInvalid, TagInvalid):
        raise ManifestUnknown("there is no such tag or digest") from None


def repository_in(path: str) -> RepositoryName:
    """Returns the repository in a path `NAME`. Raises NameUnknown if there can be no such thing."""
    name, reference = parse_path(path)
    if reference is not None:
        raise NameUnknown("there is no repository with this name")
    return name


def path_of(name: RepositoryName, reference: Reference | None) -> str:
    """Returns the path that `parse_path` parses, percent-encoded."""
    return quote(image_name(name, reference), safe="/:@")


def image_name(name: RepositoryName, reference: Reference | None) -> str:
    """Returns a reference as it stands in a pull command, without the host."""
    if reference is None:
        return name
    return f"{name}{'@' if isinstance(reference, Digest) else ':'}{reference}"


async def image_page(request: Request, name: RepositoryName, reference: Reference, upstream: str | None) -> Response:
    """Shows what `reference` leads to in the repository with this stored name. The query can have `platform`, the name
    or digest of an image of an index. Raises Unauthorized, NameUnknown, ManifestUnknown."""
    caller, platform = caller_of(request), query_of(request).one("platform") or None
    context, browser = caller.request_on(name), caller.browser
    view = await browser.manifest(context, name, reference, platform)
    contents = await browser.files(context, name, reference) if view.kind == "artifact" else None
    return await page_response(
        request,
        "image.html",
        section="repositories",
        name=name,
        image_name=image_name(name, reference),
        upstream=upstream,
        view=view,
        referrers=await browser.referrers(context, name, reference),
        contents=contents,
        bars=list(size_bars(view.image.parts)) if view.image is not None else [],
        steps_on_a_page=STEPS_ON_A_PAGE,
        purpose_names=PURPOSE_NAMES,
        is_tag=isinstance(reference, Tag),
        is_immutable=isinstance(reference, Tag) and browser.is_immutable(name, reference),
        rights=await visitor_rights(caller, name),
        host=image_host(request),
        now=datetime.now(UTC),
    )


def size_bars(parts: Sequence[SizePart]) -> Iterator[SizeBar]:
    """Yields the parts of an image's size, one beside the other."""
    total, start = sum(part.size for part in parts) or 1, 0
    for part in parts:
        yield SizeBar(part, round(1000 * start / total, 2), round(1000 * part.size / total, 2))
        start += part.size
