"""Reads the details of one manifest (`ManifestDetails`): its platforms, and the layers and the config of an image."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Final

from registry.browse.bounded_text import TextBudget
from registry.browse.content_reader import ContentReader, is_image
from registry.browse.image_config import MAX_STEPS, HistoryEntry, ImageConfig
from registry.browse.image_overview import Overview, OverviewReader
from registry.browse.models import (
    BuildStep,
    FileView,
    ImageView,
    LayerView,
    ManifestView,
    PlatformView,
    SizePart,
    utc_time,
)
from storage.content import Descriptor, Manifest
from storage.errors import ManifestUnknown
from storage.interface import Registry
from storage.names import Digest, Reference, RepositoryName, Tag
from storage.tag_listing import TagListing
from storage.upstream_tags import UpstreamTags

MAX_FILES: Final = 200
"""Largest number of blobs of an artifact that are shown. Further blobs are left out."""
MAX_RAW_BYTES: Final = 64 * 1024
"""The details of a manifest that is larger than this do not contain its bytes."""
_MAX_LAYER_PARTS: Final = 12
"""Largest number of layers that have a part of their own in the chart of an image's size."""
_DEFAULT_PLATFORM: Final = "linux/amd64"
"""The platform that is shown by default for an index, if the repository has the image of this platform."""
_TITLE: Final = "org.opencontainers.image.title"


class ManifestDetails:
    """Reads details through `registry`, which checks the rights of the current request and sends no requests to
    upstreams."""

    def __init__(
        self,
        registry: Registry,
        reader: ContentReader,
        listing: TagListing,
        overviews: OverviewReader,
        upstream_tags: UpstreamTags,
    ) -> None:
        self._registry = registry
        self._reader = reader
        self._listing = listing
        self._overviews = overviews
        self._upstream_tags = upstream_tags

    async def read(self, repo: RepositoryName, reference: Reference, platform: str | None) -> ManifestView:
        """Returns the details of a manifest. Raises NameUnknown. Raises ManifestUnknown if there is no such manifest,
        or if the manifest is an index or artifact and `platform` names an image that is not in the `platforms` of the
        result.

        `platform`: if the manifest is an index, selects which of its images is shown. It is the name of the image's
        platform, such as `linux/arm64`, or the digest of the image. None selects the default of `choose_platform`."""
        frozen = await self.find_frozen_digest(repo, reference)
        manifest = await self._registry.get_manifest(repo, frozen or reference)
        # `summary`: what the bytes of the manifest say. `facts`: what the store records about the manifest, such as its
        # tags and pulls. `overview`: the platforms, and whether the manifest is signed, has an SBOM and is attested.
        summary = await self._reader.summarize(manifest)
        facts = await self._listing.manifest(repo, manifest.digest)
        overview = (await self._overviews.read(repo, [facts], {manifest.digest: summary}))[manifest.digest]
        is_readable = summary.kind != "unreadable"
        budget = TextBudget()
        return ManifestView(
            reference=reference,
            digest=manifest.digest,
            media_type=manifest.media_type,
            kind=summary.kind,
            artifact_type=manifest.artifact_type if is_readable else None,
            size=len(manifest.body),
            subject=manifest.subject if is_readable else None,
            annotations=budget.mapping(manifest.annotations) if is_readable else {},
            annotations_truncated=budget.is_exceeded,
            tags=list(facts.tags),
            stored=utc_time(facts.stored_at),
            last_pulled=None if facts.last_pulled is None else utc_time(facts.last_pulled),
            pulls=facts.pulls,
            stored_bytes=facts.stored_bytes,
            marks=overview.marks,  # whether it is signed, has an SBOM and is attested
            frozen_at=frozen,
            platforms=list(overview.platforms),
            more_platforms=overview.more_platforms,
            image=await self._chosen_image(repo, manifest, overview, platform) if is_readable else None,
            files=await self._files(repo, manifest) if summary.kind == "artifact" else [],
            raw=manifest.body.decode("utf-8", "replace") if len(manifest.body) <= MAX_RAW_BYTES else None,
        )

    async def find_frozen_digest(self, repo: RepositoryName, reference: Reference) -> Digest | None:
        """Returns the digest at which a frozen tag is always served. Returns None if `reference` is a digest or a tag
        that is not frozen."""
        frozen = await self._upstream_tags.find_frozen_tag(repo, reference) if isinstance(reference, Tag) else None
        return None if frozen is None else frozen.digest

    async def _chosen_image(
        self, repo: RepositoryName, manifest: Manifest, overview: Overview, platform: str | None
    ) -> ImageView | None:
        """Returns the image that the details show; None if the manifest has no image, or the repository does not have
        the image."""
        if overview.summary.kind == "image":
            return await self._image_view(repo, manifest)
        chosen_platform = choose_platform(manifest.digest, overview.platforms, platform)
        if chosen_platform is None or not chosen_platform.present:
            return None
        try:
            child = await self._registry.get_manifest(repo, Digest(chosen_platform.digest))
        except ManifestUnknown:  # the manifest is damaged, or has been deleted in the meantime
            return None
        # This call parses a large manifest in a thread. The summary itself is not needed.
        await self._reader.summarize(child)
        if not child.is_readable or not is_image(child):
            return None
        return await self._image_view(repo, child, chosen_platform.name)

    async def _image_view(self, repo: RepositoryName, manifest: Manifest, platform: str = "") -> ImageView:
        """Returns the details of an image. `platform`: the platform that the index states; empty: the platform in the
        config is used.

        Call `ContentReader.summarize` with `manifest` first. `summarize` parses a large manifest in a thread, and the
        manifest keeps the result. Without this result, `_image_view` would parse the manifest on the event loop."""
        assert manifest.config is not None
        config = await self._reader.read_config(repo, manifest.config)
        layers = manifest.layers[:MAX_STEPS]
        present_blobs = await self._listing.stored_sizes(repo, (), {layer.digest for layer in layers}) if layers else {}
        history = config.history if config else ()
        steps = list_build_steps(layers, history, present_blobs)[:MAX_STEPS]
        return ImageView(
            digest=manifest.digest,
            platform=platform or (config.platform if config else ""),
            size=sum(blob.size for blob in manifest.blobs),
            config=config.view if config else None,
            steps=steps,
            more_steps=_more_steps(manifest, config, steps),
            parts=size_parts(steps, manifest.config.size, sum(blob.size for blob in manifest.blobs)),
        )

    async def _files(self, repo: RepositoryName, manifest: Manifest) -> list[FileView]:
        blobs = manifest.layers[:MAX_FILES]
        present_blobs = await self._listing.stored_sizes(repo, (), {blob.digest for blob in blobs}) if blobs else {}
        budget = TextBudget()
        return [
            FileView(title=budget.text((blob.annotations or {}).get(_TITLE)), layer=layer_view(blob, present_blobs))
            for blob in blobs
        ]


def choose_platform(index: Digest, platforms: Sequence[PlatformView], wanted: str | None) -> PlatformView | None:
    """Returns the platform to show.

    - `wanted` is the name or the digest of a platform: returns this platform. Raises ManifestUnknown if `platforms`
      does not contain it.
    - `wanted` is None: considers only platforms whose image the repository has. Returns `linux/amd64` if possible,
      otherwise the first platform. Returns None if the repository has no image."""
    if wanted is not None:
        for platform in platforms:
            if wanted in (platform.name, platform.digest):
                return platform
        raise ManifestUnknown(f"{index} lists no image for the platform {wanted[:80]!r}")
    present_platforms = [platform for platform in platforms if platform.present]
    default = (platform for platform in present_platforms if platform.name == _DEFAULT_PLATFORM)
    return next(default, present_platforms[0] if present_platforms else None)


def layer_view(layer: Descriptor, present: Container[Digest]) -> LayerView:
    """Returns the view of a layer. `present`: the digests of the blobs that the repository has."""
    return LayerView(digest=layer.digest, media_type=layer.media_type, size=layer.size, present=layer.digest in present)


def list_build_steps(
    layers: Sequence[Descriptor], history: Sequence[HistoryEntry], present: Container[Digest]
) -> list[BuildStep]:
    """Returns the build steps of an image. Each entry of the history is a step. The steps that added a layer get the
    layers in order. If the history has too few entries for all layers, each remaining layer is a step at the end,
    without a command."""
    views = [layer_view(layer, present) for layer in layers]
    next_layer = iter(views)
    steps = [
        BuildStep(
            command=entry.command,
            created=entry.created,
            comment=entry.comment,
            layer=None if entry.is_empty else next(next_layer, None),
        )
        for entry in history
    ]
    return steps + [BuildStep(command="", created=None, comment="", layer=layer) for layer in next_layer]


def size_parts(steps: Sequence[BuildStep], config_size: int, total: int) -> list[SizePart]:
    """Returns the parts of an image's size: its largest layers, its config, and all other layers as one part.
    `config_size` is the size of the config, `total` the size of the whole image, both in bytes."""
    # The sort is descending. The negative step number keeps layers of the same size in the order of the steps.
    sizes = [(step.layer.size, -number) for number, step in enumerate(steps) if step.layer is not None]
    largest = [SizePart(kind="layer", size=size, step=-negated) for size, negated in sorted(sizes, reverse=True)]
    parts = [*largest[:_MAX_LAYER_PARTS], SizePart(kind="config", size=config_size)]
    remaining_bytes = total - sum(part.size for part in parts)
    return parts if remaining_bytes <= 0 else [*parts, SizePart(kind="rest", size=remaining_bytes)]


def _more_steps(manifest: Manifest, config: ImageConfig | None, steps: Sequence[BuildStep]) -> int:
    """Estimates how many build steps of an image are missing from `steps`. The true number may be larger, but is never
    smaller: an image has at least as many steps as its history has entries, and at least as many steps as layers."""
    history_length = 0 if config is None else len(config.history) + config.omitted_history
    return max(history_length, len(manifest.layers), len(steps)) - len(steps)
