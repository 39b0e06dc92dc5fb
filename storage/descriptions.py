"""The interface of the store of descriptions of repositories (`Descriptions`): Markdown texts that people write about
repositories."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

from storage.content import Actor
from storage.names import RepositoryName

MAX_DESCRIPTION_BYTES: Final = 256 * 1024
"""Largest size of a description, in bytes of UTF-8."""


@dataclass(frozen=True, slots=True)
class Description:
    """A description; its text is empty after it was removed. `revision`: grows with each change. `at`: time of the last
    change, in seconds since 1970. `actor`: the name of the account that made this change."""

    text: str
    revision: int
    at: float
    actor: str


class Descriptions(Protocol):
    """The descriptions, which all processes share. `repo` is the name of the repository in the store. (Clients can use
    other names for a mirrored repository.)"""

    async def description(self, repo: RepositoryName) -> Description | None:
        """Returns the description; None if the repository has none."""
        ...

    async def put_description(
        self, repo: RepositoryName, text: str, *, by: Actor, revision: int | None = None
    ) -> Description:
        """Replaces the description, which is at most MAX_DESCRIPTION_BYTES long. An empty text removes it. `revision`:
        the revision that the change is based on, 0 if there was none; None: not checked. The change is durable, and the
        audit log has a line about it. Raises PreconditionFailed if the description has another revision; NameUnknown
        if the repository never had content; StorageFull, StorageFailed."""
        ...
