"""The order of tags by version, such as 1.9 before 1.10."""

from __future__ import annotations

import random
import string

from storage.version_order import version_key

VERSIONS = [
    *("edge", "latest", "release-2", "release-10", "0.9"),
    *("1.0-alpha1", "1.0-alpha2", "1.0-beta", "1.0-RC1", "1.0-rc2", "1.0-rc2-2"),
    *("1.0", "1.0-alpine", "1.0-alpine3.9", "1.0-alpine3.10", "1.0-dirty", "1.0.1", "v1.2", "1.9", "v1.10"),
    *("1.10.0-dev", "1.10.0", "2", "10", "20240101", "99999999999999999999"),
]
"""In the order of their versions."""


def test_tags_are_sorted_by_version() -> None:
    """Numbers are compared by value, pre-releases come before the release, and a leading `v` makes no difference."""
    shuffled = random.Random(1).sample(VERSIONS, len(VERSIONS))
    assert sorted(shuffled, key=version_key) == VERSIONS


def test_different_tags_have_different_keys() -> None:
    """Different tags have different keys. If two tags had the same key, a page could end between them, and the next
    page could not begin after the first one."""
    tags = ["1", "01", "001", "v1", "V1", "vv1", "1-", "1.", "1_", "1.0", "1.00", "1-rc1", "1-RC1"]
    rng = random.Random(2)
    tags += {"".join(rng.choices("v10.-_rc" + string.ascii_uppercase[:3], k=6)) for _ in range(500)}
    assert len({version_key(tag) for tag in tags}) == len(set(tags))
