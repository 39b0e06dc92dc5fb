"""The interface of the counts of disk usage (`Usage`), and the errors for exceeded quotas.

A *usage scope* (here *scope* for short) is a set of repositories, given by prefixes of their names. The store counts
the blobs, bytes and tags of each scope. A blob counts once in a scope, even if several of the scope's repositories have
it. There is a scope for each quota, one for the content of each upstream (the registries that this one mirrors), and
one for all mirrored content.

The counts are exact: they change in the transactions that add or remove blobs and tags. A scope that is new in the
settings is first counted in the background; until it is *complete*, its quota is not enforced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from storage.errors import QuotaExceeded
from storage.human_text import size_text
from storage.names import Digest, RepositoryName


@dataclass(frozen=True, slots=True)
class ScopeDefinition:
    """A scope as the settings define it. `name`: identifies it, such as `quota team/`. A repository belongs to the
    scope if its name begins with one of `prefixes` and with none of `excluded`; an empty prefix stands for all names.
    `upstream`: the name of the upstream if the scope counts the mirrored content of one upstream; None for any other
    scope. `max_bytes` and `max_tags`: the quota; None: no limit."""

    name: str
    prefixes: tuple[str, ...]
    excluded: tuple[str, ...] = ()
    upstream: str | None = None
    max_bytes: int | None = None
    max_tags: int | None = None


@dataclass(frozen=True, slots=True)
class ScopeUse:
    """What a scope contains now: `blobs` blobs with `bytes` bytes in all, and `tags` tags. While `is_complete` is
    False, the content that was stored before the scope was defined is still being counted."""

    definition: ScopeDefinition
    blobs: int
    bytes: int
    tags: int
    is_complete: bool


class Usage(Protocol):
    """The counts of all scopes, which all processes share. Changes raise StorageFull, StorageFailed."""

    async def configure(self, definitions: Sequence[ScopeDefinition]) -> None:
        """Replaces the scopes by `definitions`. A scope that is new, or whose prefixes changed, begins with nothing
        counted. Any other scope keeps its counts and takes the quota of its definition. A scope that is not in
        `definitions` is removed. After this, call `count_batch` until it returns False."""
        ...

    async def count_batch(self) -> bool:
        """Counts a small part of the stored content that is not counted yet, or deletes a small part of the counts of
        removed scopes, in one short transaction. Returns False if nothing is left to do. The counts survive the end of
        the process. Only one process at a time may call this."""
        ...

    async def scope(self, name: str) -> ScopeUse | None:
        """Returns the use of a scope; None if there is no such scope. Takes microseconds."""
        ...

    async def scopes(self) -> list[ScopeUse]:
        """Returns the use of all scopes, sorted by name."""
        ...

    async def recount(self, name: str) -> ScopeUse | None:
        """Counts the blobs, bytes and tags of the scope's repositories again, and returns the new counts. Changes
        nothing. Takes long for a large scope. Returns None if there is no such scope."""
        ...

    async def check_quota(self, repo: RepositoryName, size: int, digest: Digest | None) -> None:
        """Raises QuotaExceeded if a blob of `size` bytes does not fit into the quotas of `repo` now. `digest`: the
        blob's digest; None if it is not known. If the scope of a quota has the blob already, the blob fits into this
        quota, because a scope counts it once. This is a check in advance: the transaction that adds the blob checks
        again."""
        ...


def bytes_refusal(prefix: str, max_bytes: int, used_bytes: int, blob_bytes: int) -> QuotaExceeded:
    """Returns the error for a blob of `blob_bytes` bytes that does not fit. `prefix`: the prefix of the quota;
    empty: the quota is for all repositories."""
    used = f"{_verb(prefix, 'holds', 'hold')} {size_text(used_bytes)}"
    return QuotaExceeded(
        f"{_repositories(prefix)} may hold {size_text(max_bytes)} and {used}; this blob of {size_text(blob_bytes)} "
        "does not fit. Delete what is not needed any more, or ask the operator for more room",
        {"prefix": prefix, "max_size": max_bytes, "size": used_bytes, "blob_size": blob_bytes},
    )


def tags_refusal(prefix: str, max_tags: int, tags: int) -> QuotaExceeded:
    """Returns the error for a new tag that does not fit. `prefix`: as for `bytes_refusal`."""
    return QuotaExceeded(
        f"{_repositories(prefix)} may have {max_tags} tags and {_verb(prefix, 'has', 'have')} {tags}; delete tags that "
        "are not needed any more, or ask the operator for more",
        {"prefix": prefix, "max_tags": max_tags, "tags": tags},
    )


def _repositories(prefix: str) -> str:
    """Returns how the text of an error names the repositories of the quota."""
    return prefix or "the repositories of this registry"


def _verb(prefix: str, singular: str, plural: str) -> str:
    """Returns the form of a verb that agrees with `_repositories(prefix)`."""
    return singular if prefix else plural
