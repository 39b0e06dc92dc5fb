"""Changes of tags and frozen tags, as the management API and the commands `tag` and `mirror frozen` show them. The
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
    digest: str | None = Field(description="What the tag points at since then; null: the tag was deleted")
    previous: str | None = Field(description="What the tag pointed at before; null: there was no such tag")
    availability: Literal["stored", "deleted", "gone"] | None = Field(
        description="Whether the manifest `digest` is `stored`, or `deleted` but can be put back, or `gone`. Null if "
        "`digest` is null"
    )
    actor: str
    address: str | None
    request: str | None
    user_agent: str | None

    @classmethod
    def from_stored(cls, change: TagChange, *, with_client: bool = True) -> Self:
        """Converts an entry of the history. `with_client`: whether to include the client's address, its program and the
        id of its request."""
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
    """A tag after a change. `previous`: what it pointed at before; null: there was no such tag. `restored`: digests of
    the deleted manifests that were put back for it."""

    repository: str
    tag: str
    digest: str
    previous: str | None
    restored: list[str]

    @classmethod
    def from_stored(cls, repo: RepositoryName, move: TagMove) -> Self:
        """Converts the result of a change."""
        return cls(
            repository=repo, tag=move.tag, digest=move.digest, previous=move.previous, restored=list(move.restored)
        )


class FrozenTagResponse(BaseModel):
    """A frozen tag. `repository` is the name in the store, which begins with the name of the upstream."""

    repository: str = Field(examples=["docker.io/library/ubuntu"])
    tag: str = Field(examples=["24.04"])
    digest: str
    since: datetime
    frozen_by: str = Field(description="The account or command that froze it")

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
