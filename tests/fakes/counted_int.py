"""`CountedInt`: an integer that counts operations, for tests of how the cost of a computation grows."""

from __future__ import annotations


class CountedInt(int):
    """An integer that counts how often it is compared or hashed. All objects share the counter `operations`."""

    operations = 0

    def __lt__(self, other: int) -> bool:
        CountedInt.operations += 1
        return int(self) < int(other)

    def __le__(self, other: int) -> bool:
        CountedInt.operations += 1
        return int(self) <= int(other)

    def __gt__(self, other: int) -> bool:
        CountedInt.operations += 1
        return int(self) > int(other)

    def __ge__(self, other: int) -> bool:
        CountedInt.operations += 1
        return int(self) >= int(other)

    def __eq__(self, other: object) -> bool:
        CountedInt.operations += 1
        return int(self) == other

    def __hash__(self) -> int:
        CountedInt.operations += 1
        return hash(int(self))
