"""The setting `host_names`: further names of the registry in image names. containerd and k3s can reach a registry at
another address than the one in image names. They then send the name in the query parameter `ns`."""

from __future__ import annotations

from pathlib import Path

import pytest

from registry.config.settings_sources import ConfigError, load_settings
from storage.names import RepositoryName
from tests.fakes.app_in_process import running_app
from tests.fakes.registry_content import push_image

NAME = "registry.corp:5000"


async def test_a_mirror_serves_hosted_images_under_its_names(tmp_path: Path) -> None:
    """A registry that mirrors another one serves the images that were pushed to it, if `ns` is one of its
    `host_names`, in upper or lower case. Pushes work too. For another `ns`, the error names the setting."""
    async with running_app(tmp_path, mirror=["docker.io"], host_names=["Registry.corp:5000"]) as app:
        await push_image(app.hosted, RepositoryName("team/app"), "image", "1")
        for ns in (NAME, NAME.upper()):
            answer = await app.client("GET", f"/v2/team/app/manifests/1?ns={ns}")
            assert (answer.status, "oci-namespace" in answer) == (200, False)
            answer = await app.client("POST", f"/v2/team/app/blobs/uploads/?ns={ns}")
            assert (answer.status, "ns=" in answer["location"]) == (202, False)
        for ns in ("registry.corp", "registry.corp:5001"):
            answer = await app.client("GET", f"/v2/team/app/manifests/1?ns={ns}")
            assert (answer.status, answer.code) == (404, "NAME_UNKNOWN")
            assert "host_names" in answer.json["errors"][0]["message"]


async def test_a_browser_may_use_a_name_of_the_registry(tmp_path: Path) -> None:
    """A browser on the same machine may use a registry without accounts under one of its `host_names`, as well as
    under the host in `public_url`. Another name is refused."""
    async with running_app(tmp_path, host_names=[NAME]) as app:
        app.client.address = "127.0.0.1"
        statuses = [
            (await app.client("GET", "/v2/", {"Host": host, "Accept-Language": "en"})).status
            for host in (NAME, "rebound.example.com")
        ]
        assert statuses == [200, 403]


@pytest.mark.parametrize("name", ["docker.io", "hub.corp", "mirror.corp:443"])
def test_a_name_of_an_upstream_is_no_name_of_the_registry(tmp_path: Path, name: str) -> None:
    """The name, an alias or a host of an upstream in `host_names` is an error."""
    file = tmp_path / "entrepot.toml"
    upstream = '[[upstream]]\nname = "docker.io"\naliases = ["hub.corp"]\nhosts = ["mirror.corp:443"]\n'
    file.write_text(f'host_names = ["registry.corp", "{name}"]\n{upstream}')
    with pytest.raises(ConfigError, match=f"host_names: {name} names an upstream"):
        load_settings({}, file)


def test_the_names_can_be_an_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the environment variable, commas separate the names. They are stored in lower case."""
    monkeypatch.setenv("ENTREPOT_HOST_NAMES", "Registry.corp:5000, 10.0.0.5")
    assert load_settings({}).settings.host_names == [NAME, "10.0.0.5"]
    monkeypatch.setenv("ENTREPOT_HOST_NAMES", "http://registry.corp")
    with pytest.raises(ConfigError, match="is not a host's name"):
        load_settings({})
