"""Imports the images of a file into hosted repositories, to which clients push (`import_images`).

The import pushes the images as a client would push them, with the same checks. It does not read blobs that the
repository already has, so a second call continues an interrupted import. If only another repository has a
blob, the import checks that the file contains the blob's bytes, but does not store them again. The check is needed
because a digest alone must give no access to a blob (ADR 9).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from registry.migration.tag_times import TAG_STEP_SECONDS, natural_sort_key
from registry.router import Router
from registry.upkeep.images.found_images import CHUNK_BYTES, FoundContent, FoundImage
from registry.upkeep.images.image_trees import ImageTree, read_tree
from storage.backups import ImageFileFailed
from storage.content import Actor, Descriptor
from storage.errors import (
    BlobUnknown,
    DigestInvalid,
    ImmutableTagDenied,
    ManifestBlobUnknown,
    ManifestUnknown,
    NameUnknown,
    RegistryError,
)
from storage.imports import ImportRecords
from storage.interface import BlobWriter
from storage.jobs import JSON
from storage.names import DEFAULT_TAG, Digest, ImageReference, RepositoryName, Tag, parse_reference
from storage.patterns import ALL_NAMES
from storage.running_digest import start_digest
from storage.tag_rules import NO_IMMUTABLE_TAGS, ImmutableTags, immutable_tag_denied
from storage.upkeep.reporter import Reporter

ATTEMPTS: Final = 3
"""Largest number of attempts to push an image. An attempt fails if garbage collection deletes a blob of the image
before the image's manifest is stored."""
_HUB_PREFIXES: Final = ("docker.io/library/", "index.docker.io/library/", "docker.io/", "index.docker.io/")
"""Prefixes of names of Docker Hub images. docker does not show them."""


@dataclass(frozen=True, slots=True)
class ImportName:
    """The name under which images are imported (`--as`). `tag`: None if the images keep their tags."""

    repository: RepositoryName
    tag: Tag | None = None

    @classmethod
    def parse(cls, text: str) -> ImportName:
        """Parses `NAME` or `NAME:TAG`. Raises NameInvalid, TagInvalid; ImageFileFailed for a digest."""
        name = parse_reference(text)
        if isinstance(name.reference, Digest):
            raise ImageFileFailed(f"{text}: give a name and a tag, not a digest")
        has_tag = ":" in text.rpartition("/")[2]
        return cls(name.repository, name.reference if has_tag else None)


async def import_images(
    router: Router,
    content: FoundContent,
    name: ImportName | None,
    by: Actor,
    reporter: Reporter,
    records: ImportRecords,
    own_host: str = "",
    immutable_tags: ImmutableTags = NO_IMMUTABLE_TAGS,
    clock: Callable[[], float] = time.time,
) -> JSON:
    """Imports all images of the file. Returns the numbers of images, manifests, blobs and problems, and the number of
    uploaded bytes. A *problem* is an image that is not stored under one of its names, for one of two reasons:
    - The name has an immutable tag, which points at another image.
    - The repository has a manifest of the image, but with another media type. The import must not change this media
      type, because an immutable tag points at the manifest or at an index that contains it.

    - `name`: the name under which to import; None: the names in the file.
    - `records`: reads tags and sizes of blobs from the store, and records what was imported.
    - `own_host`: the host name of this registry, which the import removes from the names in the file; empty: not known.
    - `clock`: returns the time in seconds since 1970.

    Sets the times of the changed tags in the natural order of their names, so `build-9` is older than `build-10`.

    Raises ImageFileFailed, Denied (the name belongs to an upstream), and the other errors of pushes. Content that was
    stored before an error stays."""
    trees = [await asyncio.to_thread(read_tree, content, image) for image in content.images]
    # A referrer without a name is not in `images_to_tag`, because it gets no tag.
    referrers = [tree for tree in trees if tree.root.subject is not None]
    images_to_tag = [
        (image, tree)
        for image, tree in zip(content.images, trees, strict=True)
        if tree.root.subject is None or image.names
    ]
    targets = _targets(content, images_to_tag, name, own_host)
    importer = _Importer(router, content, by, reporter, records, immutable_tags)
    started_at = clock()
    for tree, references in targets:
        await importer.push(tree, references)
    await importer.push_referrers([tree for tree in referrers if not importer.has_stored(tree.root.digest)])
    await importer.record_changed_tags(started_at)
    return {
        "images": importer.images,
        "manifests": importer.manifests,
        "new_blobs": importer.new_blobs,
        "present_blobs": importer.present_blobs,
        "size": importer.uploaded_bytes,
        "problems": importer.problems,
    }


def _targets(
    content: FoundContent, images: list[tuple[FoundImage, ImageTree]], name: ImportName | None, own_host: str
) -> list[tuple[ImageTree, list[ImageReference]]]:
    """Returns each image with the names under which the import stores it. Raises ImageFileFailed if the file and `name`
    do not determine these names."""
    label = content.source.label
    if name is not None and name.tag is not None and len(images) > 1:
        found_names = ", ".join(text for image, _ in images for text in image.names) or "without names"
        raise ImageFileFailed(f"{label} has {len(images)} images ({found_names}); give --as NAME without a tag")
    targets = []
    for image, tree in images:
        if name is not None and name.tag is not None:
            references = [ImageReference(name.repository, name.tag)]
        elif not image.names and name is not None and len(images) == 1:
            references = [ImageReference(name.repository, Tag(DEFAULT_TAG))]
        elif not image.names:
            raise ImageFileFailed(f"{label} states no name for the image {image.digest}; give --as NAME:TAG")
        else:
            references = [_reference(label, text, name, own_host) for text in image.names]
        targets.append((tree, references))
    return targets


def _reference(label: str, text: str, name: ImportName | None, own_host: str) -> ImageReference:
    """Returns the repository and tag under which the import stores an image. `text`: a name in the file, or only a tag
    (`:TAG`). If `name` is given, takes only the tag from `text`, and the repository from `name`. Otherwise removes a
    prefix in `_HUB_PREFIXES` from `text`, and a host that is `own_host` or `localhost` or has a port. `label`: the
    file, for messages. Raises ImageFileFailed."""
    if text.startswith(":") or name is not None:
        if name is None:
            raise ImageFileFailed(f"{label} states only the tag {text[1:]} for an image; give --as NAME")
        return ImageReference(name.repository, Tag(text.rpartition(":")[2]))
    for prefix in _HUB_PREFIXES:
        if text.startswith(prefix):
            text = text.removeprefix(prefix)
            break
    host, slash, rest = text.partition("/")
    if slash and (":" in host or host in ("localhost", own_host)):
        text = rest
    try:
        reference = parse_reference(text)
    except RegistryError as error:
        raise ImageFileFailed(f"{label} names an image {text}: {error.message}; give --as NAME:TAG") from error
    if isinstance(reference.reference, Digest):
        raise ImageFileFailed(f"{label} states no tag for the image {text}; give --as NAME:TAG")
    return reference


class _Importer:
    """Pushes images from a file."""

    def __init__(
        self,
        router: Router,
        content: FoundContent,
        by: Actor,
        reporter: Reporter,
        records: ImportRecords,
        immutable_tags: ImmutableTags,
    ) -> None:
        self._router = router
        self._content = content
        self._by = by
        self._reporter = reporter
        self._records = records
        self._immutable_tags = immutable_tags
        self._stored: dict[Digest, set[RepositoryName]] = {}
        """The repositories in which each manifest was stored, by the manifest's digest."""
        self._verified: set[Digest] = set()
        """The blobs whose bytes in the file have been checked and have the right digest."""
        self._refused: set[Digest] = set()
        """The manifests of images with a problem, and the referrers of these manifests."""
        self._changed_tags: list[tuple[Tag, RepositoryName, Digest]] = []
        """The tags that the import has created or changed. Each has its repository and its new digest."""
        self.images = 0
        self.manifests = 0
        self.new_blobs = 0
        self.present_blobs = 0
        self.uploaded_bytes = 0
        self.problems = 0

    def has_stored(self, digest: Digest) -> bool:
        return digest in self._stored

    async def push(self, tree: ImageTree, references: list[ImageReference]) -> None:
        """Stores an image under all names that immutable tags allow. Reports the other names as problems."""
        by_repository: dict[RepositoryName, list[Tag]] = {}
        for repository, reference in references:
            assert isinstance(reference, Tag)
            by_repository.setdefault(repository, []).append(reference)
        for repo, named_tags in by_repository.items():
            tags = await self._changeable_tags(repo, tree, named_tags)
            if not tags:
                continue
            try:
                await self._push_to(repo, tree, tags)
            except ImmutableTagDenied as error:
                for tag in tags:
                    self._report_problem(f"{repo}:{tag}", tree, error)
                continue
            self.images += len(tags)
            for tag in tags:
                missing: list[Any] = list(tree.missing)
                self._reporter.step("image", image=f"{repo}:{tag}", digest=tree.root.digest, missing=missing)

    async def _changeable_tags(self, repo: RepositoryName, tree: ImageTree, tags: list[Tag]) -> list[Tag]:
        """Returns the tags that the import may set to the image. Reports the other tags as problems."""
        is_immutable = self._immutable_tags.in_repository(repo)
        changeable = []
        for tag in tags:
            current_digest = None
            if is_immutable(tag):
                with suppress(ManifestUnknown, NameUnknown):
                    current_digest = (await self._router.hosted.resolve_manifest(repo, tag)).digest
            if current_digest is None or current_digest == tree.root.digest:
                changeable.append(tag)
            else:
                self._report_problem(f"{repo}:{tag}", tree, immutable_tag_denied(repo, tag, current_digest))
        return changeable

    def _report_problem(self, name: str, tree: ImageTree, error: ImmutableTagDenied) -> None:
        """Reports that an image was not stored under a name."""
        self.problems += 1
        self._refused.update(tree.manifests)
        self._reporter.step("problem", image=name, digest=tree.root.digest, reason=error.message)

    async def push_referrers(self, trees: list[ImageTree]) -> None:
        """Stores each referrer in the repositories that have its subject. Leaves out the referrers of images that were
        not stored because of an immutable tag. Reports a referrer as a problem if an immutable tag forbids to store it.
        Raises ImageFileFailed if a subject is not among the manifests of the file."""
        remaining = list(trees)
        while remaining:
            storable = [tree for tree in remaining if tree.root.subject in self._stored]
            if not storable:
                # A refused image can itself be a referrer. This loop may then store the image without a tag, and its
                # referrers after it. So referrers of refused manifests are refused only when nothing is storable.
                refused_now = [tree for tree in remaining if tree.root.subject in self._refused]
                if refused_now:
                    self._refused.update(tree.root.digest for tree in refused_now)
                    remaining = [tree for tree in remaining if tree not in refused_now]
                    continue  # the next iteration refuses the referrers of these referrers
                raise ImageFileFailed(
                    f"{self._content.source.label} has no manifest {remaining[0].root.subject}, to which "
                    f"{remaining[0].root.digest} refers"
                )
            for tree in storable:
                assert tree.root.subject is not None
                for repo in list(self._stored[tree.root.subject]):
                    try:
                        await self._push_to(repo, tree, [])
                    except ImmutableTagDenied as error:
                        self._report_problem(f"{repo}@{tree.root.digest}", tree, error)
                if self.has_stored(tree.root.digest):
                    self._reporter.step("referrer", digest=tree.root.digest, subject=tree.root.subject)
            remaining = [tree for tree in remaining if tree not in storable]

    async def _push_to(self, repo: RepositoryName, tree: ImageTree, tags: list[Tag]) -> None:
        """Stores an image in a repository. `tags`: the tags to set; empty: stores the image without a tag. Makes up to
        `ATTEMPTS` attempts."""
        changed_tags = [tag for tag in tags if await self._records.tag_digest(repo, tag) != tree.root.digest]
        for attempt in range(1, ATTEMPTS + 1):
            await self._push_blobs(repo, tree)
            try:
                for digest, manifest in tree.manifests.items():
                    await self._router.put_manifest(
                        repo, manifest, tags if digest == tree.root.digest else (), by=self._by
                    )
                break
            except ManifestBlobUnknown:
                # Garbage collection has deleted a blob since `_push_blobs` stored or found it. This can happen only if
                # the import takes longer than the grace period of garbage collection.
                if attempt == ATTEMPTS:
                    raise
        for digest in tree.manifests:
            self._stored.setdefault(digest, set()).add(repo)
        self.manifests += len(tree.manifests)
        if changed_tags:
            # Recorded at once, so that retention counts the image as pulled even if it runs before the import ends.
            await self._records.record_import(repo, tree.root.digest)
        self._changed_tags += ((tag, repo, tree.root.digest) for tag in changed_tags)

    async def record_changed_tags(self, started_at: float) -> None:
        """Gives the changed tags times in the natural order of their names. The first tag gets `started_at`, the time
        at which the import began."""
        changed_tags = sorted(self._changed_tags, key=lambda changed: natural_sort_key(changed[0]))
        for position, (tag, repo, digest) in enumerate(changed_tags):
            set_at = started_at + position * TAG_STEP_SECONDS
            await self._records.record_import(repo, digest, {tag: set_at})

    async def _push_blobs(self, repo: RepositoryName, tree: ImageTree) -> None:
        """Adds the blobs of an image to a repository, in the order in which the file is read fastest."""
        position = self._content.source.position
        for blob in sorted(tree.blobs.values(), key=lambda blob: position(self._content.file_of(blob.digest))):
            await self._reporter.report(self.uploaded_bytes, unit="bytes", message=f"importing into {repo}")
            if await self._has_blob(repo, blob.digest):
                self.present_blobs += 1
                continue
            file_name = await self._find_blob(blob)
            if await self._mount(repo, blob, file_name):
                self.present_blobs += 1
            else:
                await self._push_blob(repo, blob, file_name)
                self.new_blobs += 1

    async def _has_blob(self, repo: RepositoryName, digest: Digest) -> bool:
        with suppress(BlobUnknown):
            await self._router.hosted.resolve_blob(repo, digest)
            return True
        return False

    async def _find_blob(self, blob: Descriptor) -> str:
        """Returns the name of the blob's file in the source. Raises ImageFileFailed if the source has no such file, or
        if the file's size differs from the size in the manifest."""
        source, file_name = self._content.source, self._content.file_of(blob.digest)
        size = await asyncio.to_thread(source.size, file_name)
        if size is None:
            raise ImageFileFailed(f"{source.label} is incomplete: it has no blob {blob.digest}")
        if size != blob.size:
            raise ImageFileFailed(f"{source.label}: the blob {blob.digest} has {size} bytes instead of {blob.size}")
        return file_name

    async def _mount(self, repo: RepositoryName, blob: Descriptor, file_name: str) -> bool:
        """If another repository of this registry has the blob, adds the blob to `repo` and returns True. Otherwise
        returns False. Before it adds the blob, checks the digest of the bytes in the file, unless this import has
        already checked it. Raises ImageFileFailed if the digest is wrong."""
        if await self._records.stored_size(blob.digest) != blob.size:
            return False
        if blob.digest not in self._verified:
            await self._verify(blob.digest, file_name)
        # BlobUnknown: garbage collection has just deleted the blob, or only private upstreams have it.
        with suppress(BlobUnknown):
            await self._router.mount_blob(repo, blob.digest, ALL_NAMES, self._by)
            return True
        return False

    async def _verify(self, digest: Digest, file_name: str) -> None:
        """Reads the file of a blob. Raises ImageFileFailed if the digest of the bytes is wrong."""
        running_digest = start_digest(digest.algorithm)

        async def add_to_digest(data: bytes) -> None:
            await asyncio.to_thread(running_digest.update, data)
            await self._reporter.report(self.uploaded_bytes)

        await self._read(file_name, add_to_digest)
        if running_digest.digest() != digest:
            raise ImageFileFailed(
                f"{self._content.source.label}: the blob {digest} is damaged: its bytes have another digest"
            )
        self._verified.add(digest)

    async def _push_blob(self, repo: RepositoryName, blob: Descriptor, file_name: str) -> None:
        """Uploads a blob from its file. Raises ImageFileFailed if the digest of the bytes is wrong."""
        source = self._content.source
        writer = await self._router.start_upload(repo, blob.digest.algorithm, by=self._by)
        try:
            await self._copy(file_name, writer)
            await writer.commit(blob.digest)
            self._verified.add(blob.digest)
        except DigestInvalid as error:
            raise ImageFileFailed(f"{source.label}: the blob {blob.digest} is damaged: {error.message}") from error
        except BaseException:
            with suppress(RegistryError):
                await writer.cancel()
            raise
        finally:
            with suppress(RegistryError):
                await writer.aclose()

    async def _copy(self, file_name: str, writer: BlobWriter) -> None:
        """Writes the bytes of a file to `writer`."""

        async def write(data: bytes) -> None:
            await writer.write(data)
            self.uploaded_bytes += len(data)
            await self._reporter.report(self.uploaded_bytes)

        await self._read(file_name, write)

    async def _read(self, file_name: str, on_chunk: Callable[[bytes], Awaitable[None]]) -> None:
        """Reads a file and calls `on_chunk` with each chunk of its bytes. Raises ImageFileFailed."""
        with await asyncio.to_thread(self._content.source.open, file_name) as file:
            while data := await asyncio.to_thread(file.read, CHUNK_BYTES):
                await on_chunk(data)
