"""The interface of the counts of disk usage (`Usage`), and the errors for exceeded quotas.

A *usage scope* (in this module *scope* for short) is a set of repositories, given by prefixes of their names. The store
counts the blobs, bytes and tags of each scope. A blob counts once in a scope, even if several repositories of the scope
have the blob. There is a scope for each quota, one for the content of each *upstream* (a registry that this registry
mirrors), and one for all mirrored content.

The counts are exact: they change in the transactions that add or remove blobs and tags. If a scope is new in the
settings, its content is first counted in the background. The scope is *complete* when all its content is counted. Only
the quota of a complete scope is enforced.
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
    """A scope as the settings define it. `name`: the name of the scope, such as `quota team/`. A repository belongs to
    the scope if its name begins with one of `prefixes` and with none of `excluded`; every name begins with an empty
    prefix. `upstream`: the name of the upstream if the scope counts the mirrored content of one upstream; None for any
    other scope. `max_bytes` and `max_tags`: the limits of the quota; None if there is no such limit."""

    name: str
    prefixes: tuple[str, ...]
    excluded: tuple[str, ...] = ()
    upstream: str | None = None
    max_bytes: int | None = None
    max_tags: int | None = None


@dataclass(frozen=True, slots=True)
class ScopeUsage:
    """What a scope contains now, as far as it is counted. `blobs`, `tags`: the numbers of blobs and tags. `bytes`: the
    total size of the blobs. `is_complete`: whether all content of the scope is counted."""

    definition: ScopeDefinition
    blobs: int
    bytes: int
    tags: int
    is_complete: bool


class Usage(Protocol):
    """The counts of all scopes, which all processes share. Changes raise StorageFull, StorageFailed."""

    async def configure(self, definitions: Sequence[ScopeDefinition]) -> None:
        """Replaces the scopes by `definitions`. After this, the caller calls `count_batch` until it returns False.

        - If a scope is new, or its `prefixes`, `excluded` or `upstream` changed, its counts begin at 0.
        - Any other scope in `definitions` keeps its counts, and takes the quota of its definition.
        - A scope that is not in `definitions` is removed."""
        ...

    async def count_batch(self) -> bool:
        """Counts some of the stored content that is not counted yet, or deletes some counts of removed scopes, in one
        short transaction. Returns False if nothing is left to do. The counts survive the end of the process. Only one
        process at a time may call this method."""
        ...

    async def scope(self, name: str) -> ScopeUsage | None:
        """Returns the usage of a scope; None if there is no such scope. Takes microseconds."""
        ...

    async def scopes(self) -> list[ScopeUsage]:
        """Returns the usage of all scopes, sorted by name."""
        ...

    async def recount(self, name: str) -> ScopeUsage | None:
        """Counts the blobs, bytes and tags of the scope's repositories again, and returns the new counts. Does not
        change the stored counts. Takes long for a large scope. Returns None if there is no such scope."""
        ...

    async def check_quota(self, repo: RepositoryName, size: int, digest: Digest | None) -> None:
        """Raises QuotaExceeded if a blob of `size` bytes does not fit into the quotas of `repo` now. `digest`: the
        blob's digest; None if the digest is not known. A blob with a known digest fits into each quota whose scope has
        the blob already, because a scope counts each blob once. The transaction that adds the blob checks the quotas
        again."""
        ...


def bytes_quota_error(prefix: str, max_bytes: int, used_bytes: int, blob_bytes: int) -> QuotaExceeded:
    """Returns the error for a blob of `blob_bytes` bytes that does not fit into a quota. `prefix`: the prefix of the
    quota; empty if the quota is for all repositories."""
    used = f"{_verb(prefix, 'holds', 'hold')} {size_text(used_bytes)}"
    return QuotaExceeded(
        f"{_repositories_text(prefix)} may hold {size_text(max_bytes)} and {used}; this blob of "
        f"{size_text(blob_bytes)} does not fit. Delete what is not needed any more, or ask the operator for more room",
        {"prefix": prefix, "max_size": max_bytes, "size": used_bytes, "blob_size": blob_bytes},
    )


def tags_quota_error(prefix: str, max_tags: int, tags: int) -> QuotaExceeded:
    """Returns the error for a new tag that does not fit into a quota. `prefix`: as for `bytes_quota_error`."""
    return QuotaExceeded(
        f"{_repositories_text(prefix)} may have {max_tags} tags and {_verb(prefix, 'has', 'have')} {tags}; delete tags "
        "that are not needed any more, or ask the operator for more",
        {"prefix": prefix, "max_tags": max_tags, "tags": tags},
    )


def _repositories_text(prefix: str) -> str:
    """Returns the words for the repositories of a quota in the text of an error."""
    return prefix or "the repositories of this registry"


def _verb(prefix: str, singular: str, plural: str) -> str:
    """Returns the form of a verb that agrees with `_repositories_text(prefix)`."""
    return singular if prefix else plural
