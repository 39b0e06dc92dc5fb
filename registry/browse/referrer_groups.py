"""Lists the artifacts that refer to a manifest (its *referrers*), in groups by artifact type, and reads the files of
artifacts (`ReferrerGroups`).

Referrers are found in three ways:

- The *subject* of the referrer is the manifest (OCI distribution spec, "Listing Referrers").
- A *referrer tag* points at the referrer. Older versions of cosign write such tags, for example `sha256-….sig`.
- The manifest is an index that lists the referrer as an attestation of BuildKit, next to the images.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator, Collection, Mapping
from dataclasses import replace
from typing import Final

from registry.browse.artifact_types import Purpose, purpose_of_predicate, purpose_of_tag, purpose_of_type
from registry.browse.bounded_text import TextBudget
from registry.browse.content_reader import MAX_ROW_BYTES, ContentReader
from registry.browse.file_texts import MAX_FILE_BYTES, FileText, file_text_of
from registry.browse.models import AttachedFile, FileContent, FileContents, ReferrerGroup, ReferrersView, ReferrerView
from storage.content import Descriptor, Manifest
from storage.errors import RegistryError
from storage.image_times import parse_time
from storage.interface import Registry
from storage.names import Digest, RepositoryName, Tag
from storage.tag_listing import BUNDLE_PREDICATE_ANNOTATION, TagListing

MAX_REFERRERS: Final = 100
"""Largest number of listed referrers that were found by their subject. The same limit applies to the attestations of an
index. Further referrers and attestations are left out."""
MAX_FILES: Final = 10
"""Largest number of files of an artifact that are listed and read. Further files are left out."""
# The keys of annotations of manifests, layers and index entries.
_TITLE: Final = "org.opencontainers.image.title"
_CREATED: Final = "org.opencontainers.image.created"
_PREDICATE: Final = "in-toto.io/predicate-type"
_REFERENCE_TYPE: Final = "vnd.docker.reference.type"
_REFERENCE_DIGEST: Final = "vnd.docker.reference.digest"
_ATTESTATION_TYPE: Final = "application/vnd.in-toto+json"
"""The artifact type under which BuildKit's attestations are shown."""


class ReferrerGroups:
    """Reads referrers through `registry`, which checks the rights of the current request and sends no requests to
    upstreams."""

    def __init__(self, registry: Registry, reader: ContentReader, listing: TagListing) -> None:
        self._registry = registry
        self._reader = reader
        self._listing = listing

    async def read_groups(self, repo: RepositoryName, manifest: Manifest) -> ReferrersView:
        """Returns the groups of artifacts that refer to a manifest of the repository."""
        page = await self._registry.referrers(repo, manifest.digest, None, None, MAX_REFERRERS)
        budget = TextBudget()  # for all referrers together
        referrer_views = [await self._view(repo, entry, manifest.digest, budget) for entry in page.items]
        referrer_views += [view async for view in self._views_by_tag(repo, manifest.digest, budget)]
        listed_digests = {view.digest for view in referrer_views}
        referrer_views += [view async for view in self._attestations_in_index(repo, manifest, listed_digests, budget)]
        groups: defaultdict[tuple[str, Purpose], list[ReferrerView]] = defaultdict(list)
        for view in referrer_views:
            groups[view.artifact_type or view.media_type, _purpose(view)].append(view)
        return ReferrersView(
            subject=manifest.digest,
            groups=[
                ReferrerGroup(artifact_type=artifact_type, purpose=purpose.value, referrers=views)
                for (artifact_type, purpose), views in sorted(groups.items(), key=_group_key)
            ],
            more=page.more,
        )

    async def _views_by_tag(
        self, repo: RepositoryName, subject: Digest, budget: TextBudget
    ) -> AsyncIterator[ReferrerView]:
        """Yields the manifests to which the referrer tags of `subject` point."""
        facts = await self._listing.manifest(repo, subject)
        for suffix in facts.referrer_suffixes:
            tag = Tag(subject.replace(":", "-", 1) + suffix)
            try:
                descriptor = await self._registry.resolve_manifest(repo, tag)
            except RegistryError:  # the manifest has been deleted in the meantime, or is damaged
                continue
            yield await self._view(repo, descriptor, subject, budget, tag)

    async def _attestations_in_index(
        self, repo: RepositoryName, manifest: Manifest, listed_digests: Collection[str], budget: TextBudget
    ) -> AsyncIterator[ReferrerView]:
        """Yields the attestations of BuildKit that an index lists and that the repository has. Leaves out the digests
        in `listed_digests`. Yields nothing if `manifest` is not an index."""
        summary = await self._reader.summarize(manifest)
        if summary.kind != "index":
            return
        entries = await self._reader.run_in_thread_if_large(len(manifest.body), lambda: _attestations(manifest))
        sizes = await self._listing.stored_sizes(repo, [entry.digest for entry in entries]) if entries else {}
        for entry in entries:
            if entry.digest in sizes and entry.digest not in listed_digests:
                about = (entry.annotations or {}).get(_REFERENCE_DIGEST, manifest.digest)[:200]  # no digest is longer
                descriptor = replace(entry, size=sizes[entry.digest])  # the size in the index may be wrong
                yield await self._view(repo, descriptor, about, budget, artifact_type=_ATTESTATION_TYPE)

    async def _view(
        self,
        repo: RepositoryName,
        descriptor: Descriptor,
        about: str,
        budget: TextBudget,
        tag: Tag | None = None,
        *,
        artifact_type: str | None = None,
    ) -> ReferrerView:
        """Returns the view of a referrer. `about`: the digest of the manifest to which the referrer refers. `tag`: the
        referrer tag that points at the referrer; None: the referrer was not found by a tag. `artifact_type`: the type
        to show; None: the view shows the type that the referrer's manifest states."""
        # `MAX_ROW_BYTES`: size of the largest manifest that is read for a row of a list. Here, a row is a referrer.
        is_small = descriptor.size <= MAX_ROW_BYTES
        manifest = await self._read_manifest(repo, descriptor.digest) if is_small else None
        annotations: Mapping[str, str] = {} if manifest is None else manifest.annotations
        found_type = artifact_type or (descriptor.artifact_type if manifest is None else manifest.artifact_type)
        return ReferrerView(
            digest=descriptor.digest,
            media_type=descriptor.media_type,
            artifact_type=found_type,
            size=descriptor.size,
            created=parse_time(annotations.get(_CREATED)),
            annotations=budget.mapping(annotations),
            about=about,
            tag=tag,
            files=[] if manifest is None else [_attached(layer, budget) for layer in manifest.layers[:MAX_FILES]],
        )

    async def _read_manifest(self, repo: RepositoryName, digest: Digest) -> Manifest | None:
        """Returns a manifest of the repository; None if the manifest cannot be read or cannot be parsed."""
        try:
            manifest = await self._registry.get_manifest(repo, digest)
        except RegistryError:
            return None
        return manifest if (await self._reader.summarize(manifest)).kind != "unreadable" else None

    async def read_files(self, repo: RepositoryName, manifest: Manifest) -> FileContents:
        """Returns the files of an artifact, with the texts of small files."""
        summary = await self._reader.summarize(manifest)
        layers = () if summary.kind == "unreadable" else manifest.layers
        shown_layers, budget = layers[:MAX_FILES], TextBudget()
        layer_digests = {layer.digest for layer in shown_layers}
        sizes = await self._listing.stored_sizes(repo, (), layer_digests) if layer_digests else {}
        texts: dict[Digest, FileText] = {}  # by digest: an artifact may list a file several times
        for digest, size in sizes.items():
            text = await self._read_text(repo, digest) if size <= MAX_FILE_BYTES else None
            texts[digest] = text or FileText("binary")
        return FileContents(
            digest=manifest.digest,
            files=[_content(_attached(layer, budget), texts.get(layer.digest)) for layer in shown_layers],
            more=max(0, len(layers) - MAX_FILES),
        )

    async def _read_text(self, repo: RepositoryName, digest: Digest) -> FileText | None:
        """Reads a file and returns the text to show; None if the file has been deleted in the meantime."""
        return await self._reader.read_and_parse(repo, digest, MAX_FILE_BYTES, file_text_of, max_on_loop_bytes=0)


def _attestations(index: Manifest) -> list[Descriptor]:
    """Returns the entries of an index that are attestations of BuildKit: at most MAX_REFERRERS entries, each digest
    once."""
    attestations: dict[Digest, Descriptor] = {}
    for entry in index.manifests:
        if (entry.annotations or {}).get(_REFERENCE_TYPE) == "attestation-manifest":
            attestations.setdefault(entry.digest, entry)
        if len(attestations) == MAX_REFERRERS:
            break
    return list(attestations.values())


def _content(file: AttachedFile, file_text: FileText | None) -> FileContent:
    """Returns a file with its text. `file_text` is None if the repository does not have the file."""
    text = file_text or FileText("binary")
    return FileContent(
        **file.model_dump(exclude={"predicate_type"}),
        present=file_text is not None,
        format=text.format,
        text=text.text,
        statement=text.statement,
        predicate_type=text.predicate_type or file.predicate_type,
    )


def _attached(layer: Descriptor, budget: TextBudget) -> AttachedFile:
    annotations = layer.annotations or {}
    return AttachedFile(
        title=budget.text(annotations.get(_TITLE)),
        digest=layer.digest,
        media_type=layer.media_type,
        size=layer.size,
        predicate_type=budget.text(annotations.get(_PREDICATE)),
    )


def _purpose(view: ReferrerView) -> Purpose:
    """Returns the purpose of a referrer. Derives the purpose from the first of these that exists: the referrer tag, the
    first predicate type, the artifact type."""
    if view.tag is not None:
        return purpose_of_tag(view.tag[71:])  # after `sha256-` and 64 hex digits
    predicate_types = _predicate_types(view)
    if predicate_types:
        return purpose_of_predicate(predicate_types[0])
    return purpose_of_type(view.artifact_type)


def _predicate_types(view: ReferrerView) -> list[str]:
    """Returns the predicate types (the kinds of claims) in the annotations of a referrer, in this order:

    - the type in an annotation of the referrer's manifest. A Sigstore bundle has this annotation.
    - the types in the annotations of the referrer's files."""
    bundle_predicate_type = view.annotations.get(BUNDLE_PREDICATE_ANNOTATION, "")
    predicate_types = (bundle_predicate_type, *(file.predicate_type for file in view.files))
    return [predicate_type for predicate_type in predicate_types if predicate_type]


def _group_key(group: tuple[tuple[str, Purpose], list[ReferrerView]]) -> tuple[int, str]:
    """Returns the sort key of a group. Groups are sorted by purpose (signatures, SBOMs, attestations, others), and then
    by artifact type."""
    (artifact_type, purpose), _ = group
    return list(Purpose).index(purpose), artifact_type
