"""Freezes and unfreezes mirrored tags, for the command line and the management API.

An *upstream* is a registry that this registry mirrors. A tag is *mirrored* if its repository belongs to an upstream. A
*frozen* tag stays at one digest in this registry, even if the tag moves at the upstream.
"""

from __future__ import annotations

from typing import NamedTuple

from registry.router import Router
from storage.content import Actor
from storage.errors import TagInvalid
from storage.names import Digest, RepositoryName, Tag, parse_reference, shown
from storage.upstream_tags import FrozenTag, UpstreamTags


class TagReference(NamedTuple):
    """A tag as users write it: `ubuntu:24.04` or `ubuntu:24.04@sha256:…`. `digest` is None if the user wrote no
    digest."""

    repository: RepositoryName
    tag: Tag
    digest: Digest | None = None


class FreezeResult(NamedTuple):
    """The result of `freeze_tag`. `is_new`: False if the tag was already frozen at this digest before the call."""

    frozen_tag: FrozenTag
    is_new: bool


def parse_tag_reference(text: str) -> TagReference:
    """Parses `NAME`, `NAME:TAG` or `NAME:TAG@DIGEST`. If the text has no tag, the tag is `latest`. Raises
    NameInvalid, DigestInvalid, TagInvalid. Raises TagInvalid for a digest without a tag (`NAME@DIGEST`)."""
    tagged, at_sign, digest_text = text.partition("@")
    repository, reference = parse_reference(tagged)
    assert isinstance(reference, Tag)
    if not at_sign:
        return TagReference(repository, reference)
    digest = Digest(digest_text)
    if ":" not in tagged.rpartition("/")[2]:
        raise TagInvalid(f"{shown(tagged)} names no tag to freeze; write it like {repository}:TAG@{digest}")
    return TagReference(repository, reference, digest)


async def freeze_tag(router: Router, tags: UpstreamTags, requested: TagReference, *, by: Actor) -> FreezeResult:
    """Freezes a mirrored tag at a digest:

    - the digest in `requested`, if there is one.
    - otherwise, if the tag is frozen already, the digest at which it is frozen.
    - otherwise, the digest that a pull of the tag would get.

    If the manifest is not cached, asks the upstream for it. Raises NameUnknown if the repository is not mirrored.
    Raises the errors of `Mirror.resolve_manifest` and `UpstreamTags.freeze`. An error leaves the tag as it was."""
    # `consequence` is the end of the error text for a repository that is not mirrored.
    mirrored = await router.require_mirrored(requested.repository, consequence=", so there is nothing to freeze")
    frozen_before = await tags.find_frozen_tag(mirrored.repo, requested.tag)
    reference = requested.digest or (frozen_before.digest if frozen_before else requested.tag)
    digest = (await mirrored.registry.resolve_manifest(mirrored.repo, reference)).digest
    frozen = await tags.freeze(mirrored.repo, requested.tag, digest, by=by)
    return FreezeResult(frozen, is_new=frozen != frozen_before)


async def unfreeze_tag(router: Router, tags: UpstreamTags, requested: TagReference, *, by: Actor) -> FrozenTag:
    """Unfreezes a tag, even if the settings no longer have the upstream of its repository. Returns the deleted record,
    which has the digest at which the tag was frozen. Raises TagNotFrozen."""
    return await tags.unfreeze(await router.stored_name(requested.repository), requested.tag, by=by)
