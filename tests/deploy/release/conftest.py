"""One release for the whole session, made as a person makes it."""

from __future__ import annotations

import pytest

from tests.fakes.deployment.release_files import ReleaseFiles, make_release


@pytest.fixture(scope="session")
def released(tmp_path_factory: pytest.TempPathFactory) -> ReleaseFiles:
    """What `make release` makes of the last commit, without an image."""
    return make_release(tmp_path_factory.mktemp("release") / "dist")
