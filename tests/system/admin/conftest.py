from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fakes.admin_site import ADMIN, PASSWORD, AdminSite
from tests.fakes.commands import entrepot_output
from tests.fakes.server_process import running_server


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdminSite]:
    """Yields one site for all tests. Each test makes its own names."""
    folder = tmp_path_factory.mktemp("site")
    entrepot_output("user", "add", ADMIN, "--admin", "--password-file", "-", folder=folder, given=PASSWORD)
    with running_server(folder, workers=2) as server:
        yield AdminSite(server, folder)
