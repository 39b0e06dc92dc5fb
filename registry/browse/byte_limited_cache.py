"""`ByteLimitedCache`: a cache in memory that is limited by the size of its values."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class ByteLimitedCache(Generic[T]):
    """A cache of the most recently used values. Together they take at most `max_bytes`. `bytes_of` returns the size of
    a value."""

    def __init__(self, max_bytes: int, bytes_of: Callable[[T], int]) -> None:
        self._max_bytes = max_bytes
        self._bytes_of = bytes_of
        self._values: OrderedDict[Hashable, tuple[T, int]] = OrderedDict()
        self._total_bytes = 0

    def get(self, key: Hashable) -> T | None:
        """Returns the value under `key`; None if there is none."""
        entry = self._values.get(key)
        if entry is None:
            return None
        self._values.move_to_end(key)
        return entry[0]

    def keep(self, key: Hashable, value: T) -> T:
        """Puts a value into the cache, and returns it. Evicts the least recently used values if the cache has become
        too large."""
        size = self._bytes_of(value)
        replaced = self._values.pop(key, None)
        self._values[key] = value, size
        self._total_bytes += size - (replaced[1] if replaced else 0)
        while self._total_bytes > self._max_bytes:
            _, (_, dropped_bytes) = self._values.popitem(last=False)
            self._total_bytes -= dropped_bytes
        return value
