"""The interface of the store of descriptions (`Descriptions`). A description is a Markdown text about a repository."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

from storage.content import Actor
from storage.names import RepositoryName

MAX_DESCRIPTION_BYTES: Final = 256 * 1024
"""Largest size of a description's text, in bytes of UTF-8."""


@dataclass(frozen=True, slots=True)
class Description:
    """A description.

    - `text`: empty if the description was removed.
    - `revision`: number of changes so far.
    - `at`: time of the last change, in seconds since 1970.
    - `actor`: name of the account that made the last change."""

    text: str
    revision: int
    at: float
    actor: str


class Descriptions(Protocol):
    """The descriptions, which all processes share. `repo`: the name of the repository in the store."""

    async def find_description(self, repo: RepositoryName) -> Description | None:
        """Returns the description; None if the repository never had one. A removed one has an empty text."""
        ...

    async def put_description(
        self, repo: RepositoryName, text: str, *, by: Actor, revision: int | None = None
    ) -> Description:
        """Replaces the description durably, writes a line in the audit log, and returns the new description.

        - `text`: at most `MAX_DESCRIPTION_BYTES`. An empty text removes the description.
        - `revision`: the revision that the description must have before the change. 0: the repository must never have
          had a description. None: the revision is not checked.

        Raises PreconditionFailed if the description has another revision. Raises NameUnknown if the repository never
        had content. Raises StorageFull, StorageFailed."""
        ...
