"""The errors of imports, and the records that an import needs (`ImportRecords`).

An *import* copies content from another registry (the *old registry*) into this one. Besides content, it reads and
writes records: who changed a tag last, when a tag was set at the old registry, when content was imported, and which
blobs this registry has.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Final, Protocol

from storage.errors import RegistryError
from storage.names import Digest, RepositoryName, Tag

IMPORT_PROGRAM: Final = "entrepot import"
"""The name of the program that the history of a tag shows if an import has changed the tag."""


class ContentBroken(RegistryError):
    """Content is missing or damaged at the old registry, or this registry does not accept its type.

    `path_to_broken`: not empty if the import reads an index, and a manifest below the index is broken. It then contains
    the digests of the manifests on the path to the broken manifest. The first digest is an entry of the index, and the
    last digest is the broken manifest.
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
    """The latest change of a tag. `digest`: the digest that the tag has pointed at since the change; None if the change
    deleted the tag. `at`: the time of the change, in seconds since 1970. `actor`: the account or command that made the
    change. `program`: the User-Agent of the client that made the change; `IMPORT_PROGRAM` if an import made it; empty
    for other changes that no client made."""

    digest: Digest | None
    at: float
    actor: str
    program: str


class ImportRecords(Protocol):
    """The records that imports read and write besides content. `record_import` raises StorageFull, StorageFailed."""

    async def tag_digest(self, repo: RepositoryName, tag: Tag) -> Digest | None:
        """Returns the digest that the tag points at, even if the stored manifest is known to be damaged. Returns None
        if the tag does not exist."""
        ...

    async def last_tag_change(self, repo: RepositoryName, tag: Tag) -> LastTagChange | None:
        """Returns the latest change of the tag; None if the tag never existed."""
        ...

    async def has_pointed_at(self, repo: RepositoryName, tag: Tag, digest: Digest) -> bool:
        """Returns whether the tag has ever pointed at this digest in this registry."""
        ...

    async def deleted_by_retention(self, repo: RepositoryName) -> Set[Digest]:
        """Returns the digests of the manifests that retention has deleted from the repository, if the audit log still
        has the deletion. Some of the manifests may be in the repository again."""
        ...

    async def stored_size(self, digest: Digest) -> int | None:
        """Returns the size of the blob in bytes. Returns None if no repository, hosted or mirrored, has the blob, or if
        the blob is known to be damaged."""
        ...

    async def record_import(
        self, repo: RepositoryName, digest: Digest, tags: Mapping[Tag, float] | None = None
    ) -> None:
        """Records that an import has just stored a manifest, or has pointed `tags` at it. The pulls at the old registry
        are not known. If this registry has not recorded a pull of the manifest, retention counts it as pulled now.

        `tags`: for each tag, when it was set at the old registry, in seconds since 1970. The import has set the *push
        time* of the tag (the time of its last push) to the time of the import. This method sets the push time back:

        - If the tag was changed in this registry before the import, and this change is later than the time at the old
          registry: to the time of this change.
        - Otherwise: to the time at the old registry.

        Never sets a push time forward. Skips a tag that no longer points at the manifest, or that was pushed again
        after the import. The history of tags keeps the time of the import."""
        ...
