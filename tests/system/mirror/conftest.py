"""The fixture `site`: a pull-through mirror in front of a fake Docker Hub, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.fakes.mirror_site import MirrorSite


@pytest.fixture
def site(tmp_path: Path) -> Iterator[MirrorSite]:
    """Provides a mirror that is not running yet. The test starts it with `site.start()`."""
    with ExitStack() as stack:
        yield MirrorSite(tmp_path, stack)
