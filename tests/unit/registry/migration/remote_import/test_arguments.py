"""The arguments of an import over the network: the URL of the old registry, the login and the repositories."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from registry.config import Upstream
from registry.migration.remote_options import RemoteOptions
from storage.imports import ImportInvalid
from storage.store.stored_registry import StoredRegistry
from tests.fakes.hub.hub import Hub
from tests.fakes.import_run import ImportRun, assert_complete
from tests.fakes.upstream_content import UpstreamContent, noise_image
from tests.unit.registry.migration.remote_import.conftest import APP


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"url": "http://ann:pw@old:5000"}, "must not contain a user name or password"),
        ({"url": "http://old:5000/v2/"}, "must end after the host and port"),
        ({"username": "ann"}, "has no password"),
    ],
)
async def test_invalid_arguments_are_refused(run_import: ImportRun, arguments: dict[str, Any], reason: str) -> None:
    """A URL with a login or a path is refused, and so is a user name without a password."""
    with pytest.raises(ImportInvalid, match=reason):
        await run_import(**arguments)


async def test_repositories_that_are_not_listed(run_import: ImportRun, old_registry: Hub) -> None:
    """If the old registry does not list its repositories, the import fails with an error that states what to do. If the
    operator names an unknown repository, it is reported and the import continues."""
    with pytest.raises(ImportInvalid, match=r"does not give out the list .* pass it with --repositories FILE"):
        await run_import(repositories=None)
    result = await run_import(repositories=["team/none", "UPPER"])
    assert result["problems"] == 2
    assert [name for name, _ in run_import.reports()] == ["team/none:", "UPPER:"]


async def test_login(
    store: StoredRegistry,
    old_registry: Hub,
    run_import: ImportRun,
    content: UpstreamContent,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A private repository is imported with a login, for which the old registry issues a token. A wrong login is
    reported."""
    image = content.add(APP, noise_image("image", 1000), "1")
    old_registry.put(content)
    old_registry.set(auth="bearer", username="ann", password="right", private=(str(APP),), redirects=True)
    login: dict[str, Any] = {"username": "ann", "password_env": "OLD_PASSWORD"}

    monkeypatch.setenv("OLD_PASSWORD", "wrong")
    result = await run_import(**login)
    assert (result["tags"], result["problems"]) == (0, 1)
    assert "refuses the login" in run_import.reports()[0][1]

    monkeypatch.setenv("OLD_PASSWORD", "right")
    await run_import(**login)
    await assert_complete(store, APP, image)


async def test_the_login_of_an_upstream_in_the_settings(
    store: StoredRegistry,
    old_registry: Hub,
    run_import: ImportRun,
    content: UpstreamContent,
    configured_upstreams: list[Upstream],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If the URL of the old registry is an endpoint of an upstream in the settings, the login of this upstream is
    used."""
    image = content.add(APP, noise_image("image", 1000), "1")
    old_registry.put(content)
    old_registry.set(auth="basic", username="ann", password="right")
    monkeypatch.setenv("OLD_PASSWORD", "right")
    upstream = {"name": "old.test", "endpoints": [old_registry.url], "username": "ann", "password_env": "OLD_PASSWORD"}
    configured_upstreams.append(Upstream.model_validate(upstream))
    await run_import()
    await assert_complete(store, APP, image)


@pytest.mark.parametrize(("name", "key"), [("docker.io", "https://index.docker.io/v1/"), ("old.test", "old.test")])
async def test_the_login_that_docker_has_stored_under_the_name_of_an_upstream(
    store: StoredRegistry,
    old_registry: Hub,
    run_import: ImportRun,
    content: UpstreamContent,
    configured_upstreams: list[Upstream],
    tmp_path: Path,
    name: str,
    key: str,
) -> None:
    """The login of the upstream in the settings can be in docker's `config.json`. The import finds it there under the
    key that belongs to the name of the upstream, as the mirror does."""
    image = content.add(APP, noise_image("image", 1000), "1")
    old_registry.put(content)
    old_registry.set(auth="basic", username="ann", password="right")
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"auths": {key: {"auth": base64.b64encode(b"ann:right").decode()}}}))
    upstream = {"name": name, "endpoints": [old_registry.url], "docker_config": file}
    configured_upstreams.append(Upstream.model_validate(upstream))
    await run_import()
    await assert_complete(store, APP, image)


def test_a_login_of_the_options_belongs_to_no_upstream() -> None:
    """The import has the name of the upstream in the settings only if it uses the login of this upstream. A login in
    the options must not be sent to a token service on the domain of that name."""
    upstream = Upstream.model_validate({"name": "ghcr.io", "endpoints": ["https://proxy.test"]})
    assert RemoteOptions("https://proxy.test").configured_name([upstream]) == "ghcr.io"
    assert RemoteOptions("https://other.test").configured_name([upstream]) is None
    assert RemoteOptions("https://proxy.test", username="ann").configured_name([upstream]) is None
