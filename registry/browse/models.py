"""The objects that the routes of `/api/v1` return and the pages show. They can be written as JSON.

The class names, docstrings and field descriptions appear in the OpenAPI document. Times are in UTC, sizes in bytes. A
text that an image contains, such as a label, is cut if it is too long for a page (`registry.browse.bounded_text`).
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from storage.human_text import MAX_SHOWN_TIME

Kind = Literal["image", "index", "artifact", "unreadable"]
"""What a manifest is. `unreadable`: it is damaged, or exceeds a limit that older versions of Entrepot did not have."""


class View(BaseModel):
    """Base class of the objects."""

    model_config = ConfigDict(frozen=True)


def utc_time(seconds: float) -> datetime:
    """Converts seconds since 1970 to a UTC time. Rounds to milliseconds. Returns the end of the year 9999 for any later
    time, because earlier versions could store such times."""
    return datetime.fromtimestamp(min(round(seconds, 3), MAX_SHOWN_TIME), UTC)


class PlatformView(View):
    """The manifest for one platform: an entry of an index, or a single image."""

    name: str = Field(description="The platform, such as `linux/arm64/v8`; empty: unknown", examples=["linux/amd64"])
    digest: str
    media_type: str
    present: bool = Field(
        description="Whether this registry has the manifest. A mirror fetches a missing manifest at its next pull"
    )
    size: int | None = Field(
        description="Size of the config and the layers, as stored and transferred; null: unknown, for example because "
        "the manifest is not present"
    )


class MarksView(View):
    """Which kinds of artifacts refer to the image. The registry does not verify these artifacts."""

    signed: bool = Field(description="There is a signature, such as cosign's or Notation's")
    sbom: bool = Field(description="There is a list of what the image contains")
    attested: bool = Field(description="There is an attestation, such as the provenance that BuildKit writes")


class TagRow(View):
    """A tag, and what it points at."""

    tag: str
    digest: str
    media_type: str
    kind: Kind
    artifact_type: str | None
    platforms: list[PlatformView]
    more_platforms: int = Field(description="Number of platforms that are not in `platforms`")
    stored_bytes: int | None = Field(
        description="Number of bytes that this registry stores of the image, for all platforms; null: the images on "
        "the page have too many manifests or blobs to add up. `order=size` sorts the list by this field"
    )
    created: datetime | None = Field(description="When the image was made, according to its config or an annotation")
    pushed: datetime = Field(description="When the tag was last pushed; in a mirror, when it was last fetched")
    pushed_by: str | None = Field(description="Who made the tag point at this digest")
    last_pulled: datetime | None
    pulls: int
    marks: MarksView
    immutable: bool = Field(description="Clients cannot move or delete the tag")
    frozen_at: str | None = Field(
        description="The digest that each pull of a frozen tag gets, even after the tag moves at the upstream; null: "
        "the tag is not frozen"
    )


class TagRowPage(View):
    """A page of the tags of a repository. `next`: to get the next page, send this value as `after`; null: this is the
    last page. `order`: the order of the list. If the list has too many tags or manifests to sort by size, the order is
    `name` instead of `size`."""

    items: list[TagRow]
    next: str | None
    order: Literal["name", "version", "pushed", "size"]


class LayerView(View):
    """A layer of an image. `present`: whether this registry has it."""

    digest: str
    media_type: str
    size: int
    present: bool


class BuildStep(View):
    """A step of the build, from the history in the image's config."""

    command: str = Field(description="The command, written as in a Dockerfile if possible; empty: unknown")
    created: datetime | None
    comment: str
    layer: LayerView | None = Field(description="The layer that the step made; null: the step changed only the config")


class SizePart(View):
    """A part of an image's size, for a chart. A part of the kind `rest` is the total of all layers that are not listed
    as parts. `step`: for a layer, the index of its build step in the image's `steps`; null for other kinds."""

    kind: Literal["layer", "config", "rest"]
    size: int
    step: int | None = None


class ConfigView(View):
    """The config of an image. `truncated`: whether the config has more entries or longer texts than are shown here."""

    digest: str
    created: datetime | None
    author: str
    user: str
    working_dir: str
    entrypoint: list[str] | None
    cmd: list[str] | None
    env: list[str]
    exposed_ports: list[str]
    volumes: list[str]
    labels: dict[str, str]
    stop_signal: str
    healthcheck: list[str] | None
    truncated: bool


class ImageView(View):
    """An image of one platform. `config` is null if the config is not present, is too large, or is not the config of an
    image. If `config` is null, `steps` has a step without a command for each layer."""

    digest: str
    platform: str
    size: int
    config: ConfigView | None
    steps: list[BuildStep]
    more_steps: int = Field(description="Number of steps that are not in `steps`")
    parts: list[SizePart] = Field(
        description="How the size is made up: the largest layers first, then the config and the rest"
    )


class FileView(View):
    """A blob of an artifact. `title`: its file name, from the annotation `org.opencontainers.image.title`."""

    title: str
    layer: LayerView


class ManifestView(View):
    """A manifest in detail.

    `tags`: the first tags that point at the manifest. `image`: the image to show; null if there is none. For an index:

    - If the request names a platform: the image of this platform.
    - If the request names no platform: the image for linux/amd64 if it is present, otherwise the first image that is
      present."""

    reference: str = Field(description="The tag or digest that was asked for")
    digest: str
    media_type: str
    kind: Kind
    artifact_type: str | None
    size: int = Field(description="Size of the manifest itself")
    subject: str | None
    annotations: dict[str, str]
    annotations_truncated: bool
    tags: list[str]
    stored: datetime = Field(description="When the manifest was last pushed; in a mirror, when it was stored")
    last_pulled: datetime | None
    pulls: int
    stored_bytes: int | None
    marks: MarksView
    frozen_at: str | None
    platforms: list[PlatformView]
    more_platforms: int
    image: ImageView | None
    files: list[FileView] = Field(description="The blobs of an artifact, at most 200")
    raw: str | None = Field(
        description="The manifest as text; null if it is larger than 64 KiB. "
        "`/repositories/NAME/manifests/REFERENCE/raw` returns a manifest of any size"
    )


class AttachedFile(View):
    """A file of a referrer. `predicate_type`: for an attestation, the in-toto predicate type that an annotation of the
    file names (in the referrer's manifest); empty if there is no such annotation."""

    title: str
    digest: str
    media_type: str
    size: int
    predicate_type: str


class ReferrerView(View):
    """A manifest that refers to another one."""

    digest: str
    media_type: str
    artifact_type: str | None
    size: int
    created: datetime | None
    annotations: dict[str, str]
    about: str = Field(
        description="Digest of the manifest to which the referrer refers. In an index, an attestation by BuildKit "
        "refers to the image of one platform"
    )
    tag: str | None = Field(
        description="The tag by which the referrer was found, such as `sha256-….sig`; null: the referrer was "
        "found by its subject or in an index"
    )
    files: list[AttachedFile] = Field(description="At most 10")


class ReferrerGroup(View):
    """The referrers that have the same artifact type and purpose. The registry derives the purpose from their types,
    annotations and tags, and does not verify it."""

    artifact_type: str
    purpose: Literal["signature", "sbom", "attestation", "other"]
    referrers: list[ReferrerView]


class ReferrersView(View):
    """The referrers of a manifest: signatures, SBOMs, attestations and other artifacts. `more`: whether the manifest
    has more referrers than are listed here; `/v2/NAME/referrers/DIGEST` lists all."""

    subject: str
    groups: list[ReferrerGroup]
    more: bool


class FileContent(View):
    """A file of an artifact.

    - `text`: null if the file is large, is not text, or is not present.
    - `statement`: the statement in the DSSE envelope or Sigstore bundle that the file contains, as JSON text; null if
      `text` is null, if there is no statement, or if the statement is too long or too deeply nested to show.
    - `predicate_type`: the in-toto predicate type that the statement names. If the statement names none: the predicate
      type that the file's annotation names. Empty if neither names one."""

    title: str
    digest: str
    media_type: str
    size: int
    present: bool
    format: Literal["json", "text", "binary"]
    text: str | None
    statement: str | None
    predicate_type: str


class FileContents(View):
    """The files of an artifact. `more`: the number of further files, which are not in `files`."""

    digest: str
    files: list[FileContent]
    more: int


class ComparedImage(View):
    """One of two images that are compared."""

    reference: str
    digest: str
    platform: str
    size: int
    created: datetime | None
    has_config: bool = Field(description="Whether the config is present; without it, only layers are compared")


class ComparedLayer(View):
    """A layer of one of the images. `command`: the command of the build step that has made the layer; empty if it is
    not known."""

    digest: str
    size: int
    command: str


class ConfigChange(View):
    """A difference between the configs. `name`: the variable, label, port or volume that differs; empty for other
    fields. `base` and `other`: the value in each config; null if the config has no such value."""

    field: str = Field(examples=["env"])
    name: str
    base: str | None
    other: str | None


class ComparisonView(View):
    """How one image differs from another. `shared_layers` are in both images, `base_layers` only in `base`, and
    `other_layers` only in `other`. At most 1000 changes are listed."""

    base: ComparedImage
    other: ComparedImage
    shared_layers: list[ComparedLayer]
    base_layers: list[ComparedLayer]
    other_layers: list[ComparedLayer]
    shared_bytes: int
    changes: list[ConfigChange]


class RemovedTag(View):
    """A tag that was removed, would be removed, or was restored. `digest`: the digest of the tag's manifest."""

    tag: str
    digest: str


class RefusedTag(View):
    """A tag that was not changed. `reason`: why it was not changed."""

    tag: str
    reason: str


class RemovalPlanView(View):
    """What a removal of tags would remove.

    `manifests`: the digests of the manifests that are removed with the tags. An image stays if it has another tag or an
    index lists it."""

    tags: list[RemovedTag]
    referrer_tags: list[RemovedTag] = Field(
        description="Tags such as `sha256-….sig` that belong to images that would be removed; these tags would be "
        "removed as well"
    )
    immutable_tags: list[str] = Field(description="Tags that stay, because clients may not delete them")
    unknown_tags: list[str] = Field(description="Tags that do not exist")
    manifests: list[str]
    freed_bytes: int = Field(description="Number of bytes that garbage collection frees after its grace period")
    complete: bool = Field(
        description="False: `manifests` and `freed_bytes` cover only the first 2000 manifests, and there may be more"
    )


class RemovedTags(View):
    """What was removed. To undo the removal, send `removed` as `tags` to `/repositories/NAME/tag-restoration`, within
    the grace period of garbage collection. `manifests`: number of manifests that were removed."""

    removed: list[RemovedTag]
    refused: list[RefusedTag]
    manifests: int
    restorable: bool = Field(
        description="False: the disk was too full to keep the removed manifests, so they cannot be put back"
    )
    problem: str | None = Field(
        description="Why some manifests that nothing uses any more were not removed; null: all were removed"
    )


class RestoredTags(View):
    """The removed tags that were put back (`restored`), and those that were not (`refused`)."""

    restored: list[RemovedTag]
    refused: list[RefusedTag]


class DescriptionView(View):
    """What people have written about a repository. If nobody has, the texts are empty, and `revision` is 0."""

    text: str = Field(description="Markdown")
    html: str = Field(description="The text as HTML that contains no scripts, styles, images or relative links")
    formatted: bool = Field(
        description="False: the text is too long or has too many elements, so the HTML shows the text, or its "
        "end, as plain text"
    )
    revision: int = Field(description="Grows with each change; 0: nobody has written anything yet")
    changed: datetime | None
    changed_by: str | None
