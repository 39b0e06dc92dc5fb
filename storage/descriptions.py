"""The interface of the store of descriptions (`Descriptions`): Markdown texts that people write about repositories."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

from storage.content import Actor
from storage.names import RepositoryName

MAX_DESCRIPTION_BYTES: Final = 256 * 1024
"""Largest size of a description, in bytes of UTF-8."""


@dataclass(frozen=True, slots=True)
class Description:
    """A description. A removed description has an empty text. `revision` grows with each change. `at` is the time of
    the last change, in seconds since 1970. `actor` is the account that made this change."""

    text: str
    revision: int
    at: float
    actor: str


class Descriptions(Protocol):
    """The descriptions, which all processes share. `repo` is the name of the repository in the store."""

    async def description(self, repo: RepositoryName) -> Description | None:
        """Returns the description, also a removed one; None if the repository never had one."""
        ...

    async def put_description(
        self, repo: RepositoryName, text: str, *, by: Actor, revision: int | None = None
    ) -> Description:
        """Replaces the description. `text` has at most MAX_DESCRIPTION_BYTES; an empty text removes the description.
        `revision` is the revision that the caller replaces; 0: the repository never had a description; None: any. The
        change is durable and in the audit log. Raises PreconditionFailed if the description has another revision.
        Raises NameUnknown if the repository never had content. Raises StorageFull and StorageFailed."""
        ...
