"""A fixture with the files of a release. They are made only once, with `make release`."""

from __future__ import annotations

import pytest

from tests.fakes.deployment.release_files import ReleaseFiles, make_release


@pytest.fixture(scope="session")
def released(tmp_path_factory: pytest.TempPathFactory) -> ReleaseFiles:
    """Returns the files that `make release` makes from the last commit, without a container image."""
    return make_release(tmp_path_factory.mktemp("release") / "dist")
