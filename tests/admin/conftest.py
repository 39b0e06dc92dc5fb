from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.admin.site import ADMIN, PASSWORD, Site
from tests.cli.running import done_well
from tests.serving import running_server


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One for all tests: each has its own names."""
    folder = tmp_path_factory.mktemp("site")
    done_well("user", "add", ADMIN, "--admin", "--password-file", "-", folder=folder, given=PASSWORD)
    with running_server(folder, workers=2) as server:
        yield Site(server, folder)
