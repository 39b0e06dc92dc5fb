"""Freezes and unfreezes mirrored tags, for the command line and the management API.

A *frozen* tag stays at one digest, even if the upstream registry moves the tag. A tag is *mirrored* if its repository
belongs to an upstream.
"""

from __future__ import annotations

from typing import NamedTuple

from registry.router import Router
from storage.content import Actor
from storage.errors import TagInvalid
from storage.names import Digest, RepositoryName, Tag, parse_reference, shown
from storage.upstream_tags import FrozenTag, UpstreamTags


class TagReference(NamedTuple):
    """A tag of a repository, as users write it: `ubuntu:24.04`. `digest`: the digest after the tag, as in
    `ubuntu:24.04@sha256:…`; None if there is none."""

    repository: RepositoryName
    tag: Tag
    digest: Digest | None = None


class FreezeResult(NamedTuple):
    """The result of `freeze_tag`. `is_new`: False if the tag was frozen at this digest before the call."""

    frozen: FrozenTag
    is_new: bool


def parse_tag_reference(text: str) -> TagReference:
    """Parses `NAME`, `NAME:TAG` or `NAME:TAG@DIGEST`. The tag of `NAME` is `latest`. Raises NameInvalid, DigestInvalid
    or TagInvalid. A digest without a tag (`NAME@DIGEST`) raises TagInvalid."""
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
    """Freezes a mirrored tag:

    - at the digest in `requested`, if there is one.
    - otherwise, if the tag is frozen already, at its present digest.
    - otherwise at the digest that a pull would get now.

    If the manifest is not cached, asks the upstream for it. Raises NameUnknown if the repository is not mirrored, and
    the errors of `Mirror.resolve_manifest`. After an error, nothing has changed."""
    mirrored = await router.require_mirrored(requested.repository, consequence=", so there is nothing to freeze")
    frozen_before = await tags.find_frozen_tag(mirrored.repo, requested.tag)
    reference = requested.digest or (frozen_before.digest if frozen_before else requested.tag)
    digest = (await mirrored.registry.resolve_manifest(mirrored.repo, reference)).digest
    frozen = await tags.freeze(mirrored.repo, requested.tag, digest, by=by)
    return FreezeResult(frozen, is_new=frozen != frozen_before)


async def unfreeze_tag(router: Router, tags: UpstreamTags, requested: TagReference, *, by: Actor) -> FrozenTag:
    """Unfreezes a tag. Returns the record of the tag from before this call, with the digest at which it was frozen.
    Also works if the settings no longer have the upstream of the repository. Raises TagNotFrozen."""
    return await tags.unfreeze(await router.stored_name(requested.repository), requested.tag, by=by)
