"""The interface of the records that an import from another registry (the *old registry*) reads and writes in addition
to content (`ImportRecords`), and the errors of imports. The records say who changed a tag last, when a tag was set at
the old registry, when content was imported, and which blobs this registry has."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Final, Protocol

from storage.errors import RegistryError
from storage.names import Digest, RepositoryName, Tag

IMPORT_PROGRAM: Final = "entrepot import"
"""The name of the program in the history of tags, if an import has made the change."""


class ContentBroken(RegistryError):
    """Content of the registry from which the import reads (the old registry) is missing there, damaged, or of a type
    that is not accepted here. `path_to_broken`: set if the import reads an index, and a manifest below the index is
    broken; otherwise empty. The digests of the manifests on the path from the index to the broken manifest: the first
    one is in the list of the index, the last one is the broken manifest."""

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


class SourceDown(RegistryError):
    """The old registry does not answer any more, so the import has ended. The content that was imported stays."""

    code = "SOURCE_DOWN"
    default = "the old registry does not answer; run the import again later: it continues"


@dataclass(frozen=True, slots=True)
class LastTagChange:
    """The latest change of a tag. `digest`: the digest that the tag points at since then; None if the change deleted
    the tag. `at`: in seconds since 1970. `actor`: the account or command that changed it. `program`: the User-Agent of
    the client that changed it. If the registry itself changed it, a name of the work that did so, such as
    `IMPORT_PROGRAM`."""

    digest: Digest | None
    at: float
    actor: str
    program: str


class ImportRecords(Protocol):
    """The records that imports read and write in addition to content. Changes raise StorageFull, StorageFailed."""

    async def tag_digest(self, repo: RepositoryName, tag: Tag) -> Digest | None:
        """Returns the digest that a tag points at, even if its manifest is known to be damaged; None if there is no
        such tag."""
        ...

    async def last_tag_change(self, repo: RepositoryName, tag: Tag) -> LastTagChange | None:
        """Returns the latest change of a tag; None if there never was such a tag."""
        ...

    async def has_pointed_at(self, repo: RepositoryName, tag: Tag, digest: Digest) -> bool:
        """Returns whether the tag has ever pointed at this digest in this registry."""
        ...

    async def deleted_by_retention(self, repo: RepositoryName) -> Set[Digest]:
        """Returns the manifests of the repository that retention has deleted, as far back as the audit log goes. The
        repository may have some of them again."""
        ...

    async def stored_size(self, digest: Digest) -> int | None:
        """Returns the size in bytes of the blob, if any repository, hosted or mirrored, has it; otherwise None. Returns
        None also for a blob that is known to be damaged."""
        ...

    async def record_import(
        self, repo: RepositoryName, digest: Digest, tags: Mapping[Tag, float] | None = None
    ) -> None:
        """Records that an import has just stored a manifest, or has pointed `tags` at it. The pulls at the old registry
        are not known here, so retention counts the manifest as pulled now, unless this registry has already recorded
        a pull of it.

        `tags`: for each tag, when it was set at the old registry, in seconds since 1970. The time of the tag's last
        push here, which is the time of the import, is set back to this time. It is not set back to before the tag's
        previous change in this registry. Skips a tag that no longer points at the manifest, or that was pushed again
        after the import. The history of tags keeps the time of the import."""
        ...
