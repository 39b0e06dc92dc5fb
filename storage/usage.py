"""The interface of the counts of disk usage (`Usage`), and the errors for exceeded quotas.

A *usage scope* (in this module *scope* for short) is the set of repositories whose names have certain prefixes. The
store counts the blobs, bytes and tags of each scope. A blob counts once in a scope, even if several repositories of the
scope have the blob. An *upstream* is a registry that this registry mirrors. There are these scopes:

- one for each quota,
- one for the mirrored content of each upstream,
- one for all mirrored content.

The transactions that add or remove blobs and tags also change the counts. When a scope is new or changed, the registry
may have content of the scope already. This content is counted in the background. A scope is *complete* when all its
content is counted. The counts of a complete scope are exact. A quota is enforced only if its scope is complete.
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
    """A scope as the settings define it.

    - `name`: the name of the scope, such as `quota team/`.
    - `prefixes`, `excluded`: a repository belongs to the scope if its name begins with one of `prefixes`, and with none
      of `excluded`. The empty prefix is the beginning of every name.
    - `upstream`: the name of the upstream whose mirrored content the scope counts; None for any other scope.
    - `max_bytes`, `max_tags`: the limits of the quota; None for no limit."""

    name: str
    prefixes: tuple[str, ...]
    excluded: tuple[str, ...] = ()
    upstream: str | None = None
    max_bytes: int | None = None
    max_tags: int | None = None


@dataclass(frozen=True, slots=True)
class ScopeUsage:
    """The content of a scope that is counted so far. `blobs`, `tags`: the numbers of blobs and tags. `bytes`: the total
    size of the blobs. `is_complete`: whether all content of the scope is counted."""

    definition: ScopeDefinition
    blobs: int
    bytes: int
    tags: int
    is_complete: bool


class Usage(Protocol):
    """The counts of all scopes. All processes share the counts. `configure` and `count_batch` raise StorageFull and
    StorageFailed."""

    async def configure(self, definitions: Sequence[ScopeDefinition]) -> None:
        """Replaces the scopes by `definitions`. The caller must then call `count_batch` until it returns False.

        - The counts of a scope begin at 0 if the scope is new, or if its `prefixes`, `excluded` or `upstream` changed.
        - Any other scope in `definitions` keeps its counts. Its quota becomes that of the definition.
        - A scope that is not in `definitions` is removed."""
        ...

    async def count_batch(self) -> bool:
        """Counts some of the content that is not counted yet, or deletes some of the counts of removed scopes, in one
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
        blob's digest; None if the digest is not known. A blob fits into each quota whose scope has the blob already.
        The transaction that adds the blob checks the quotas again."""
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
    """Returns how error messages name the repositories of a quota."""
    return prefix or "the repositories of this registry"


def _verb(prefix: str, singular: str, plural: str) -> str:
    """Returns the form of a verb that agrees with `_repositories_text(prefix)`."""
    return singular if prefix else plural
