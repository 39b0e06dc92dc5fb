"""The errors of imports, and the records that an import needs (`ImportRecords`).

An *import* copies content from another registry (the *old registry*) into this registry.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Final, Protocol

from storage.errors import RegistryError
from storage.names import Digest, RepositoryName, Tag

IMPORT_PROGRAM: Final = "entrepot import"
"""The name of the program in the history of a tag, for a change that an import made."""


class ContentBroken(RegistryError):
    """Content is missing or damaged at the old registry, or this registry does not accept the type of the content.

    `path_to_broken`: the digests of the manifests on the path from an index to the broken manifest. The first digest is
    that of a child of the index. The last digest is that of the broken manifest. Empty if no manifest below an
    index is broken.
    """

    code = "CONTENT_BROKEN"
    default = "the content is broken at the old registry"

    def __init__(
        self, message: str | None = None, detail: object = None, *, path_to_broken: tuple[Digest, ...] = ()
    ) -> None:
        super().__init__(message, detail)
        self.path_to_broken = path_to_broken


class ImportInvalid(RegistryError):
    """The source of an import cannot be read, or an argument of the import is not valid."""

    code = "IMPORT_INVALID"
    default = "the import cannot begin"


class OldRegistryDown(RegistryError):
    """The old registry does not answer any more, so the import ends. The content that was imported stays."""

    code = "SOURCE_DOWN"
    default = "the old registry does not answer; run the import again later: it continues"


@dataclass(frozen=True, slots=True)
class LastTagChange:
    """The latest change of a tag.

    - `digest`: the digest that the tag has pointed at since the change; None if the change deleted the tag.
    - `at`: the time of the change, in seconds since 1970.
    - `actor`: the account or command that made the change.
    - `program`: `IMPORT_PROGRAM` if an import made the change; the User-Agent of the client if a client made it;
      otherwise empty."""

    digest: Digest | None
    at: float
    actor: str
    program: str


class ImportRecords(Protocol):
    """The records that imports need in addition to the content."""

    async def tag_digest(self, repo: RepositoryName, tag: Tag) -> Digest | None:
        """Returns the digest that the tag points at, even if the manifest is known to be damaged. Returns None if the
        tag does not exist."""
        ...

    async def last_tag_change(self, repo: RepositoryName, tag: Tag) -> LastTagChange | None:
        """Returns the latest change of the tag, which may be its deletion; None if the tag never existed."""
        ...

    async def has_pointed_at(self, repo: RepositoryName, tag: Tag, digest: Digest) -> bool:
        """Returns whether the tag has ever pointed at this digest in this registry."""
        ...

    async def deleted_by_retention(self, repo: RepositoryName) -> Set[Digest]:
        """Returns the digests of the manifests that retention has deleted from the repository, as far as the audit log
        goes back. Some of these manifests may have been stored again since."""
        ...

    async def stored_size(self, digest: Digest) -> int | None:
        """Returns the size of the blob in bytes. Returns None if no repository, hosted or mirrored, has the blob, or if
        the blob is known to be damaged."""
        ...

    async def record_import(
        self, repo: RepositoryName, digest: Digest, tags: Mapping[Tag, float] | None = None
    ) -> None:
        """Records that an import has just stored a manifest, or has pointed `tags` at the manifest. Raises StorageFull,
        StorageFailed. If this registry has recorded no pull of the manifest, retention counts the manifest as pulled
        now.

        `tags`: for each tag, the time at which it was set at the old registry, in seconds since 1970. The *push time*
        of a tag is the time of its last push. The import has set the push time to the time of the import. This
        method sets the push time back to the later of these two times:

        - the time at which the tag was set at the old registry
        - the time of the tag's last change in this registry before the import, if there is one

        Skips a tag that no longer points at the manifest, or that was pushed again after the import.
        The history of tags keeps the time of the import."""
        ...
