"""Rules about tags: patterns of tags (`TagPattern`), and the immutable tags of each repository (`ImmutableTags`).

If a tag is *immutable* and exists, clients cannot:

- delete the tag, or point the tag at another manifest.
- delete a manifest that the tag needs, or change the media type of such a manifest.

Only an operator or an admin can force a change of the tag. A rule looks only at names, so a tag can be immutable before
it exists. Clients can create such a tag.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Self

from storage.errors import ImmutableTagDenied, with_redacted
from storage.names import Digest, RepositoryName, Tag
from storage.patterns import NamePattern, NameSet

IsImmutable = Callable[[str], bool]
"""A function that returns whether a tag of one repository is immutable. The argument is the tag's name."""
_PATTERN: Final = re.compile(r"[a-zA-Z0-9._*?\[\]!-]+")
_MAX_PATTERN_LENGTH: Final = 128
"""Longest pattern in characters: as long as the longest tag."""


class TagPattern(str):
    """A pattern for names of tags, as in a shell: `*` matches any text, `?` one character, `[0-9]` one digit. The
    constructor raises ValueError, with a message for the user, if the text is not a valid pattern."""

    __slots__ = ()

    def __new__(cls, text: str) -> Self:
        if not _PATTERN.fullmatch(text) or len(text) > _MAX_PATTERN_LENGTH:
            raise ValueError(f"{text!r} is not a pattern of tags, such as v* or *-nightly")
        return super().__new__(cls, text)


@dataclass(frozen=True)
class TagRule:
    """A rule that makes tags immutable. It matches a tag if one of `tags` matches the tag's name, and one of
    `repositories` matches the name of the tag's repository."""

    repositories: tuple[NamePattern, ...]
    tags: tuple[TagPattern, ...]

    @cached_property
    def tag_matcher(self) -> re.Pattern[str]:
        """A regular expression that matches a tag's name if one of the patterns in `tags` does."""
        return re.compile("|".join(fnmatch.translate(pattern) for pattern in self.tags))


def nothing_immutable(tag: str) -> bool:
    """An `IsImmutable` for a repository without immutable tags."""
    return False


class ImmutableTags:
    """Tells which tags are immutable.

    - `rules`: a tag is immutable if a rule matches the tag and the tag's repository is not mirrored. The tags of a
      mirrored repository follow the upstream.
    - `mirrored`: the names of the upstream registries that this registry mirrors. In the store, the first
      segment of a mirrored repository's name is the name of the upstream."""

    def __init__(self, rules: Sequence[TagRule] = (), mirrored: Iterable[str] = ()) -> None:
        upstreams = frozenset(mirrored)
        # `without_names_below` leaves out the mirrored repositories: their first segment is the name of an upstream.
        self._rules = [
            (NameSet(frozenset(rule.repositories)).without_names_below(upstreams), rule.tag_matcher) for rule in rules
        ]

    def is_immutable(self, repo: RepositoryName, tag: str) -> bool:
        """Returns whether the tag is immutable. `repo`: the name of the tag's repository in the store."""
        return any(matcher.match(tag) is not None and repo in names for names, matcher in self._rules)

    def in_repository(self, repo: RepositoryName) -> IsImmutable:
        """Returns the `IsImmutable` of the repository. It is `nothing_immutable` if no rule matches the repository."""
        matchers = [matcher for names, matcher in self._rules if repo in names]
        if not matchers:
            return nothing_immutable
        return lambda tag: any(matcher.match(tag) is not None for matcher in matchers)


NO_IMMUTABLE_TAGS: Final = ImmutableTags()


# `with_redacted(error, redacted)`: `redacted` is for clients that may not see the digests or tags in `error`.


def immutable_tag_denied(repo: RepositoryName, tag: Tag, current: Digest) -> ImmutableTagDenied:
    """Returns the error for a push of other content to an immutable tag, which points at `current`."""
    return with_redacted(
        ImmutableTagDenied(
            f"{repo}:{tag} is immutable and points at {current}; push another tag", {"tag": tag, "current": current}
        ),
        ImmutableTagDenied(f"{repo}:{tag} is immutable and exists already; push another tag", {"tag": tag}),
    )


def immutable_delete_denied(repo: RepositoryName, tag: str, digest: Digest | None = None) -> ImmutableTagDenied:
    """Returns the error for a delete that the immutable `tag` forbids. `digest`: the manifest that the client wants to
    delete and that the tag needs; None: the client wants to delete the tag itself."""
    if digest is None:
        return ImmutableTagDenied(f"{repo}:{tag} is immutable and cannot be deleted", {"tag": tag})
    return with_redacted(
        ImmutableTagDenied(f"{repo}:{tag} is immutable and needs {digest}, which cannot be deleted", {"tag": tag}),
        ImmutableTagDenied(f"an immutable tag of {repo} needs {digest}, which cannot be deleted"),
    )


def immutable_type_denied(repo: RepositoryName, digest: Digest, media_type: str, tag: str) -> ImmutableTagDenied:
    """Returns the error for a push that would change the media type of the manifest `digest`, which the immutable
    `tag` needs. `media_type`: the stored media type of the manifest."""
    return with_redacted(
        ImmutableTagDenied(
            f"{repo}:{tag} is immutable and needs {digest} with media type {media_type}; "
            "push the manifest with this Content-Type",
            {"tag": tag, "media_type": media_type},
        ),
        ImmutableTagDenied(
            f"an immutable tag of {repo} needs {digest} with the stored media type; "
            "push the manifest with this Content-Type"
        ),
    )
