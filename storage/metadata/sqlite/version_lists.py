"""Lists of tags in the order of versions, such as `1.9` before `1.10` (`VersionLists`). SQLite cannot sort by versions,
so a list is sorted in Python and kept until the repository's tags change."""

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

_MAX_KEPT_NAMES: Final = 300_000
"""Largest number of names in all cached lists together. A single list is cached even if it has more. This number of
names usually takes 10 MB of memory, and up to 100 MB if all names have the greatest length."""
_MAX_NEW_ENTRIES: Final = 20_000
"""If the tag history has more new entries than this, the list is read again, without a check whether one of the entries
is about the repository."""
_NAMES: Final = "SELECT name FROM tag WHERE repository = ? ORDER BY name"
_NEWEST_ENTRY: Final = "SELECT coalesce(max(id), 0) FROM tag_history"
_HAS_CHANGED: Final = "SELECT 1 FROM tag_history NOT INDEXED WHERE id > ? AND repository = ? LIMIT 1"
"""NOT INDEXED forbids the indexes of the table. SQLite then reads only the entries with greater ids, in the order of
the ids."""


@dataclass(slots=True)
class _VersionList:
    """The names of a repository's tags in the order of versions. `newest_entry`: the id of the newest entry in the tag
    history when the list was last known to be current. Each change of a tag adds an entry."""

    names: tuple[str, ...]
    """A tuple, because Python's garbage collector skips tuples of texts. In a list, it would visit each of the
    names."""
    newest_entry: int


class VersionLists:
    """Caches the lists of the repositories whose tags were listed most recently. Used by one thread at a time."""

    def __init__(self) -> None:
        self._lists: OrderedDict[int, _VersionList] = OrderedDict()

    def page(
        self, db: apsw.Connection, repository: int, query: TagQuery, after: TagCursor | None, limit: int
    ) -> list[str]:
        """Returns names of tags that match `query`, at most `limit`. Their order is ascending or descending, as `query`
        says. Begins with the name after the tag `after` in this order. If `after` is None, begins with the first
        name."""
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
        """Returns all names of the repository's tags in the order of versions, from the cache if they are current."""
        newest_entry: int = db.execute(_NEWEST_ENTRY).get
        cached_list = self._lists.pop(repository, None)
        if cached_list is None or not _is_current(db, repository, cached_list, newest_entry):
            rows: list[Any] = db.execute(_NAMES, (repository,)).fetchall()
            names = tuple(sorted((name for (name,) in rows), key=version_key))
            cached_list = _VersionList(names, newest_entry)
        cached_list.newest_entry = newest_entry
        self._lists[repository] = cached_list
        while (
            len(self._lists) > 1
            and sum(len(version_list.names) for version_list in self._lists.values()) > _MAX_KEPT_NAMES
        ):
            self._lists.popitem(last=False)
        return cached_list.names


def _is_current(db: apsw.Connection, repository: int, cached_list: _VersionList, newest_entry: int) -> bool:
    """Returns whether the list is known to be current. Returns False if a tag of the repository has changed since the
    list was made. Also returns False if the tag history has more than `_MAX_NEW_ENTRIES` new entries."""
    if newest_entry == cached_list.newest_entry:
        return True
    if not 0 < newest_entry - cached_list.newest_entry <= _MAX_NEW_ENTRIES:
        return False
    return db.execute(_HAS_CHANGED, (cached_list.newest_entry, repository)).get is None
