"""The interface of what an import of another registry needs to know and to change besides the content itself
(`ImportRecords`): who changed a tag last, and when content was pushed at the other registry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from storage.names import Digest, RepositoryName, Tag


@dataclass(frozen=True, slots=True)
class TagChange:
    """The latest change of a tag. `digest`: what the tag points at since then; None if the change deleted the tag.
    `at`: in seconds since 1970. `actor`: the account or command that changed it. `program`: the User-Agent of the
    client, or the name of the work inside this program that changed it."""

    digest: Digest | None
    at: float
    actor: str
    program: str


class ImportRecords(Protocol):
    """What imports read and write besides content. Changes raise StorageFull, StorageFailed."""

    async def last_tag_change(self, repo: RepositoryName, tag: Tag) -> TagChange | None:
        """Returns the latest change of a tag; None if there never was such a tag."""
        ...

    async def save_times(
        self, repo: RepositoryName, digest: Digest, pushed: float | None, tags: Mapping[Tag, float]
    ) -> None:
        """Stores when a manifest was pushed and when its tags were set, at the registry from which they came. Times are
        seconds since 1970; None: not known. A time later than the stored one changes nothing, nor does a tag that
        points at another manifest meanwhile. The history of tags keeps the time of the import."""
        ...
