"""Lists the repositories that a visitor may pull: either the *hosted* repositories, to which clients push, or the
repositories that are mirrored from one upstream.

`Registry.repositories` lists hosted and mirrored names together, in byte order, one page in each call. The name of a
mirrored repository begins with the name of its upstream, so the names of an upstream form one range. All names outside
these ranges are hosted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from registry.ui.pages import PageComponents
from storage.names import RepositoryName
from storage.patterns import NameSet

PAGE_SIZE: Final = 50
"""Largest number of repositories that a page shows."""
_MAX_REGISTRY_CALLS: Final = 40
"""Largest number of calls of `Registry.repositories` for one `RepositoryPage`. After this number of calls, the page
ends even if it has fewer than `PAGE_SIZE` names. Each call skips the names of at most one upstream."""
_AFTER_EVERY_CHARACTER: Final = "\x7f"
"""A character that sorts after every character that a repository name can have."""


@dataclass(frozen=True, slots=True)
class RepositoryPage:
    """A page of a list of repositories. `next_after`: the cursor of the next page; None: this page is the last one."""

    names: Sequence[RepositoryName]
    next_after: str | None


def visible_upstreams(components: PageComponents, pullable_names: NameSet) -> list[str]:
    """Returns the names of the upstreams from which the visitor may pull, sorted. `pullable_names`: the names of all
    repositories that the visitor may pull."""
    # In byte order, the names of an upstream come directly after the text `{upstream}/`. `seek` gets this text, and
    # returns the same text or a later one. The set has no name between the two texts. None: the set has no later name.
    # So if the result does not begin with `{upstream}/`, the set has no name of the upstream.
    return [
        upstream
        for upstream in sorted(components.naming.upstreams)
        if (pullable_names.seek(f"{upstream}/") or "").startswith(f"{upstream}/")
    ]


async def list_repositories(
    components: PageComponents, upstream: str | None, prefix: str, after: str | None
) -> RepositoryPage:
    """Returns a page of repositories. Raises the errors of `Registry.repositories`, such as RequestInvalid for a cursor
    of another list.

    - `upstream`: lists the repositories of this upstream; None: lists hosted repositories.
    - `prefix`: lists the repositories whose names begin with this text. For an upstream, `prefix` may contain the
      upstream's name, as in `docker.io/library`, or leave it out, as in `library`.
    - `after`: the cursor of this page, from `next_after` of the previous page; None: the first page."""
    base = f"{upstream}/" if upstream is not None else ""
    if prefix.startswith(base):
        prefix = prefix[len(base) :]
    wanted_prefix = base + prefix
    if any(character >= _AFTER_EVERY_CHARACTER for character in prefix):
        return RepositoryPage([], None)  # no name has such a character
    if after is None and wanted_prefix:
        after = _just_before(wanted_prefix)
    names: list[RepositoryName] = []
    for _ in range(_MAX_REGISTRY_CALLS):
        page = await components.content.repositories(after, PAGE_SIZE - len(names))
        # The next call continues at `next_after` if the page has it, otherwise after the last name of the page.
        after = page.next_after or (page.items[-1] if page.items else after)
        for name in page.items:
            if not name.startswith(wanted_prefix):
                if name > wanted_prefix:  # all names with the prefix come before this name
                    return RepositoryPage(names, None)
                continue
            if upstream is None and (range_end := _upstream_range_end(components, name)) is not None:
                after = range_end  # the next call continues after all names of this upstream
                break
            names.append(name)
        else:  # the whole page was read
            if not page.more:
                return RepositoryPage(names, None)
        if len(names) >= PAGE_SIZE:
            break
    return RepositoryPage(names, after)


def _upstream_range_end(components: PageComponents, name: str) -> str | None:
    """Returns a text that sorts after all names of the upstream from which `name` is mirrored. Returns None if `name`
    is hosted."""
    segment, slash, _ = name.partition("/")
    return f"{segment}/{_AFTER_EVERY_CHARACTER}" if slash and segment in components.naming.upstreams else None


def _just_before(text: str) -> str:
    """Returns a text that sorts before `text`, with no repository name between the two texts."""
    return text[:-1] + chr(ord(text[-1]) - 1) + _AFTER_EVERY_CHARACTER
