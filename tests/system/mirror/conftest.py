from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.fakes.mirror_site import MirrorSite


@pytest.fixture
def site(tmp_path: Path) -> Iterator[MirrorSite]:
    """A mirror, which a test starts with `start`."""
    with ExitStack() as stack:
        yield MirrorSite(tmp_path, stack)
