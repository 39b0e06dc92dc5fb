"""Models of tag changes and of frozen tags, for the management API and the commands `tag` and `mirror frozen`. The
docstrings of the models and the descriptions of their fields appear in the OpenAPI document."""

from __future__ import annotations

from datetime import datetime
from typing import Literal, Self

from pydantic import BaseModel, Field

from registry.admin import models
from storage.names import RepositoryName
from storage.tag_history import TagChange, TagMove
from storage.upstream_tags import FrozenTag


class TagChangeResponse(BaseModel):
    """A change of a tag. `address`, `request` and `user_agent` are null for a caller who may not push."""

    id: str
    tag: str
    at: datetime
    digest: str | None = Field(description="The digest after the change; null: the change deleted the tag")
    previous: str | None = Field(description="The digest before the change; null: the tag did not exist")
    availability: Literal["stored", "deleted", "gone"] | None = Field(
        description="`stored`: the repository has the manifest `digest`. `deleted`: the manifest was deleted, but can "
        "be put back. `gone`: it cannot be put back. Null: `digest` is null"
    )
    actor: str
    address: str | None
    request: str | None
    user_agent: str | None

    @classmethod
    def from_stored(cls, change: TagChange, *, with_client: bool = True) -> Self:
        """Converts an entry of the history. `with_client`: whether to include `address`, `request` and `user_agent`."""
        return cls(
            id=str(change.id),
            tag=change.tag,
            at=models.to_datetime(change.at),
            digest=change.digest,
            previous=change.previous,
            availability=None if change.availability is None else change.availability.value,
            actor=change.by.name,
            address=change.by.address if with_client else None,
            request=change.by.request_id if with_client else None,
            user_agent=change.by.user_agent if with_client else None,
        )


class TagMoveResponse(BaseModel):
    """A tag that was pointed at a manifest. `digest`: the digest that the tag points at now. `previous`: the digest
    that the tag pointed at before; null: the tag did not exist. `restored`: digests of the deleted manifests that were
    put back for this change."""

    repository: str
    tag: str
    digest: str
    previous: str | None
    restored: list[str]

    @classmethod
    def from_stored(cls, repo: RepositoryName, move: TagMove) -> Self:
        """Converts the result of a move."""
        return cls(
            repository=repo, tag=move.tag, digest=move.digest, previous=move.previous, restored=list(move.restored)
        )


class FrozenTagResponse(BaseModel):
    """A frozen tag: the mirror serves only `digest` for this tag. `repository`: the stored name of the repository. It
    begins with the name of the upstream."""

    repository: str = Field(examples=["docker.io/library/ubuntu"])
    tag: str = Field(examples=["24.04"])
    digest: str
    since: datetime
    frozen_by: str = Field(description="The account or command that froze the tag")

    @classmethod
    def from_stored(cls, frozen: FrozenTag) -> Self:
        """Converts a stored frozen tag."""
        return cls(
            repository=frozen.repository,
            tag=frozen.tag,
            digest=frozen.digest,
            since=models.to_datetime(frozen.at),
            frozen_by=frozen.actor,
        )
