"""Lists the tags of a repository in the order of versions, such as `1.9` before `1.10`. SQLite cannot sort by versions,
so Python sorts each list, and `VersionListCache` keeps the list until a tag of the repository changes."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import apsw

from storage.retention import REFERRER_TAG
from storage.tag_listing import TagCursor, TagQuery
from storage.version_order import version_key

_MAX_CACHED_NAMES: Final = 300_000
"""Largest number of names in all cached lists together. If a single list has more names, it is cached, and all other
lists are removed from the cache. 300,000 names usually take 10 MB of memory, and up to 100 MB if all of them have the
greatest length."""
_MAX_NEW_ENTRIES: Final = 20_000
"""Largest number of new entries of the tag history that the cache searches to check whether a cached list is current.
New entries are those that were added since the list was last read or checked. The list is current if none of the new
entries is about the repository. If there are more new entries, the list is read again without a search."""
_SELECT_NAMES: Final = "SELECT name FROM tag WHERE repository = ? ORDER BY name"
_SELECT_NEWEST_ENTRY: Final = "SELECT coalesce(max(id), 0) FROM tag_history"
_SELECT_NEW_ENTRY: Final = "SELECT 1 FROM tag_history NOT INDEXED WHERE id > ? AND repository = ? LIMIT 1"
"""Finds an entry about the repository whose id is greater than a given id. NOT INDEXED makes SQLite read only the
entries with greater ids, and not all entries of the repository."""


@dataclass(slots=True)
class _SortedNames:
    """The names of a repository's tags in the order of versions. `newest_entry`: the id of the newest entry in the tag
    history when the list was last read or checked. Each change of a tag adds an entry."""

    names: tuple[str, ...]
    """A tuple, because Python's garbage collector skips a tuple of texts, but visits each item of a list."""
    newest_entry: int


class VersionListCache:
    """Caches the lists of the repositories whose tags were listed most recently. Only one thread at a time may use the
    cache."""

    def __init__(self) -> None:
        self._lists: OrderedDict[int, _SortedNames] = OrderedDict()

    def page(
        self, db: apsw.Connection, repository: int, query: TagQuery, after: TagCursor | None, limit: int
    ) -> list[str]:
        """Returns the names of at most `limit` tags that match `query`, in the order of versions, or in the reverse
        order if `query.is_descending` is true. `after`: only tags that come after this tag in the order; None: all
        tags."""
        names, text = self._names(db, repository), query.text.lower()
        if query.is_descending:
            stop = len(names) if after is None else bisect_left(names, version_key(after.name), key=version_key)
            positions = range(stop - 1, -1, -1)
        else:
            start = 0 if after is None else bisect_right(names, version_key(after.name), key=version_key)
            positions = range(start, len(names))
        matching: list[str] = []
        for position in positions:
            name = names[position]
            if text not in name.lower() or (not query.includes_referrer_tags and REFERRER_TAG.fullmatch(name)):
                continue
            matching.append(name)
            if len(matching) == limit:
                break
        return matching

    def _names(self, db: apsw.Connection, repository: int) -> Sequence[str]:
        """Returns the names of all tags of the repository in the order of versions. Takes the names from the cache if
        the cached list is current."""
        newest_entry: int = db.execute(_SELECT_NEWEST_ENTRY).get
        cached_list = self._lists.pop(repository, None)
        if cached_list is None or not _is_current(db, repository, cached_list, newest_entry):
            rows: list[Any] = db.execute(_SELECT_NAMES, (repository,)).fetchall()
            names = tuple(sorted((name for (name,) in rows), key=version_key))
            cached_list = _SortedNames(names, newest_entry)
        cached_list.newest_entry = newest_entry
        self._lists[repository] = cached_list
        while (
            len(self._lists) > 1
            and sum(len(sorted_names.names) for sorted_names in self._lists.values()) > _MAX_CACHED_NAMES
        ):
            self._lists.popitem(last=False)
        return cached_list.names


def _is_current(db: apsw.Connection, repository: int, cached_list: _SortedNames, newest_entry: int) -> bool:
    """Returns True only if no tag of the repository has changed since the list was last read or checked. Returns False
    without a search if the tag history has more than `_MAX_NEW_ENTRIES` new entries."""
    if newest_entry == cached_list.newest_entry:
        return True
    if not 0 < newest_entry - cached_list.newest_entry <= _MAX_NEW_ENTRIES:
        return False
    return db.execute(_SELECT_NEW_ENTRY, (cached_list.newest_entry, repository)).get is None
