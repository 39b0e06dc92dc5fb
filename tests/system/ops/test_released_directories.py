"""Tests that the current version can open the data directory of every released version without loss."""

from __future__ import annotations

from pathlib import Path

import pytest

from registry import __version__
from release.versions import released_versions
from tests.fakes.admin_site import ADMIN, PASSWORD, AdminSite
from tests.fakes.client_images import image
from tests.fakes.clients.registry_client import RegistryClient, assert_same_image, pull_all
from tests.fakes.released_directory import ARCHIVES, HOSTED, basic, settings, unpack
from tests.fakes.server_process import ROOT, running_server

# By version: the archive of a data directory.
ARCHIVED_DIRECTORIES = {
    path.name.removeprefix("entrepot-").removesuffix(".tar.gz"): path for path in ARCHIVES.glob("*.tar.gz")
}
NOWHERE = "http://127.0.0.1:9"
"""The address of an upstream that cannot be reached: the port belongs to the discard service (RFC 863), which no
machine offers any more."""


def test_every_released_version_has_an_archive() -> None:
    """Each version with a date in the changelog has an archive of a data directory. Only the next version may have one
    too."""
    assert set(released_versions(ROOT)) <= set(ARCHIVED_DIRECTORIES) <= {*released_versions(ROOT), __version__}


@pytest.mark.parametrize("version", ARCHIVED_DIRECTORIES)
def test_directory_of_a_released_version_opens(version: str, tmp_path: Path) -> None:
    """Every tag of the directory can be pulled with all its content, cached tags even while the upstream cannot be
    reached. Accounts, permissions, API tokens, tag histories and referrers are unchanged. A deleted tag can be
    restored, new images can be pushed, and `entrepot fsck` finds no errors."""
    content = unpack(ARCHIVED_DIRECTORIES[version], tmp_path)
    with running_server(tmp_path, "--config", str(settings(tmp_path, NOWHERE))) as server:
        site = AdminSite(server, tmp_path)
        admin = RegistryClient(server.address, basic(ADMIN, PASSWORD))
        for repo, tags in content.tags.items():
            for tag, digest in tags.items():
                assert admin.digest(repo, tag) == digest
                pull_all(admin, repo, tag)
        assert sorted(admin.tags(HOSTED)) == sorted(content.tags[HOSTED])
        assert [
            each["digest"] for each in site.call_ok("GET", f"/repositories/{HOSTED}/tags/latest/history")["items"]
        ] == (content.history)
        referrers = admin.ask("GET", f"/v2/{HOSTED}/referrers/{content.tags[HOSTED]['1']}").json()["manifests"]
        assert [each["digest"] for each in referrers] == content.referrers
        site.call_ok("POST", f"/repositories/{HOSTED}/tags/old/restore", {})
        assert admin.digest(HOSTED, "old") == content.deleted
        alice = RegistryClient(server.address, basic("alice", PASSWORD))
        alice.push(HOSTED, "new", pushed := image("after the upgrade"))
        assert_same_image(alice, HOSTED, "new", pushed)
        robot = RegistryClient(server.address, basic("ci", content.robot))
        assert robot.digest(HOSTED, "new") == pushed.digest
        assert robot.ask("POST", f"/v2/{HOSTED}/blobs/uploads/").status == 403
        assert RegistryClient(server.address).ask("GET", f"/v2/{HOSTED}/tags/list").status == 401
        site.command("fsck", "--hash")  # ends with 0 if it finds nothing
