"""`ByteLimitedCache`: a cache in memory that limits the total size of its values."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class ByteLimitedCache(Generic[T]):
    """A cache of the most recently used values. `max_bytes`: largest total size of the cached values. `bytes_of`:
    returns the size of a value in bytes."""

    def __init__(self, max_bytes: int, bytes_of: Callable[[T], int]) -> None:
        self._max_bytes = max_bytes
        self._bytes_of = bytes_of
        self._values: OrderedDict[Hashable, tuple[T, int]] = OrderedDict()
        self._total_bytes = 0

    def get(self, key: Hashable) -> T | None:
        """Returns the value of `key`; None if the cache does not have the key."""
        entry = self._values.get(key)
        if entry is None:
            return None
        self._values.move_to_end(key)
        return entry[0]

    def put(self, key: Hashable, value: T) -> T:
        """Caches `value` and returns it. If the cache becomes too large, evicts the least recently used values. A value
        larger than `max_bytes` is evicted immediately."""
        size = self._bytes_of(value)
        replaced = self._values.pop(key, None)
        self._values[key] = value, size
        self._total_bytes += size - (replaced[1] if replaced else 0)
        while self._total_bytes > self._max_bytes:
            _, (_, dropped_bytes) = self._values.popitem(last=False)
            self._total_bytes -= dropped_bytes
        return value
