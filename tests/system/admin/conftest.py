"""Fixtures for the tests of the management API: one server with accounts, and one mirror with accounts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fakes.admin_site import ADMIN, PASSWORD, AdminSite
from tests.fakes.commands import entrepot_output
from tests.fakes.hub.hub import Hub, hub
from tests.fakes.server_process import running_server
from tests.fakes.upstream_content import UpstreamContent, noise_image

MIRRORED = noise_image("image", 1000)
WARMED = noise_image("warm", 3000, 200_000)


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdminSite]:
    """Yields one server with two workers for all tests. Each test uses account and repository names that no other test
    uses."""
    folder = tmp_path_factory.mktemp("site")
    entrepot_output("user", "add", ADMIN, "--admin", "--password-file", "-", folder=folder, stdin_text=PASSWORD)
    with running_server(folder, workers=2) as server:
        yield AdminSite(server, folder)


@pytest.fixture(scope="session")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """Yields a fake docker.io, which has `library/app:1`, `team/app:1` and other images."""
    content = UpstreamContent()
    content.add("library/app", MIRRORED, "1", "2", "3")
    content.add("team/app", MIRRORED, "1")
    content.add("library/warm", WARMED, "1", "2")
    with hub(tmp_path_factory.mktemp("upstream"), content) as running:
        yield running


@pytest.fixture(scope="session")
def mirror_site(upstream: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdminSite]:
    """Yields a mirror of the fake docker.io. All tests share the mirror, so each test unfreezes the tags that it has
    frozen."""
    folder = tmp_path_factory.mktemp("site")
    entrepot_output("user", "add", ADMIN, "--admin", "--password-file", "-", folder=folder, stdin_text=PASSWORD)
    (folder / "entrepot.toml").write_text(
        f'[[upstream]]\nname = "docker.io"\ndefault = true\nendpoints = ["{upstream.url}"]\n'
    )
    with running_server(folder, "--config", str(folder / "entrepot.toml"), workers=2) as server:
        yield AdminSite(server, folder)
