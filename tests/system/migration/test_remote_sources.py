"""Tests of imports from registries with private certificates, with logins, and from another Entrepot server."""

from __future__ import annotations

import base64
import json
import time
from pathlib import Path

import pytest

from tests.fakes.admin_site import ADMIN, PASSWORD
from tests.fakes.certificate_authority import certificates
from tests.fakes.clients.registry_client import RegistryClient
from tests.fakes.commands import entrepot, entrepot_output
from tests.fakes.real_upstreams import docker_registry, push, slow_link
from tests.fakes.same_content import assert_same_content, catalog
from tests.fakes.server_process import running_server
from tests.fakes.upstream_content import UpstreamContent, index_of, noise_image


@pytest.fixture
def content() -> UpstreamContent:
    images = UpstreamContent()
    image = images.add("team/app", index_of((noise_image("a", 1000), "amd64"), (noise_image("b", 10), "arm64")), "1")
    images.add("team/app", noise_image("signature", 10, subject=image))
    images.add("other", noise_image("other", 10, docker=True), "1")
    return images


def test_import_over_tls(tmp_path: Path, content: UpstreamContent) -> None:
    """An import from a registry with a private certificate works with `--ca-file` or with `--insecure`."""
    bundle = certificates(tmp_path)
    # `slow_link` runs nginx in front of the registry. Here nginx does not limit the rate, but adds TLS.
    with docker_registry(tmp_path, content) as old, slow_link(tmp_path, old.url, certificates=bundle) as tls_front:
        names = tmp_path / "names"
        names.write_text("other\n")
        command = ("import", tls_front.url, "--repositories", names)
        option_sets = [["--ca-file", str(bundle.authority)], ["--insecure"]]
        for number, options in enumerate(option_sets):
            out = entrepot_output(*map(str, [*command, *options]), "--data", str(number), folder=tmp_path)
            assert "tags: 1 imported" in out


def test_another_entrepot_with_accounts(tmp_path: Path, content: UpstreamContent) -> None:
    """With a login, the import gets all repositories that the account may pull, with their referrers. Without a login
    it gets nothing, and prints a note."""
    folder = tmp_path / "old"
    folder.mkdir()
    with running_server(folder) as old:
        push(old.address, content)
    data = ("--data", str(folder / "data"))
    entrepot_output("user", "add", ADMIN, "--admin", "--password-file", "-", *data, folder=folder, stdin_text=PASSWORD)
    (tmp_path / "password").write_text(PASSWORD + "\n")
    with running_server(folder) as old, running_server(tmp_path / "new") as new:
        command = ("import", old.url, "--data", new.data)
        anonymous = entrepot(*command, folder=tmp_path)
        assert anonymous.stdout.startswith("repositories: 0;")
        assert anonymous.stderr == f"note: {old.address} lists no repositories: it may need another login\n"

        login = ("--username", ADMIN, "--password-file", "password", "--json")
        out = entrepot_output(*map(str, command), *login, folder=tmp_path)
        result = json.loads(out.splitlines()[-1])
        assert (result["repositories"], result["tags"], result["problems"]) == (2, 2, 0)
        basic = "Basic " + base64.b64encode(f"{ADMIN}:{PASSWORD}".encode()).decode()
        old_client, new_client = RegistryClient(old.address, basic), RegistryClient(new.address)
        compared_count = assert_same_content(old_client, new_client)
        assert compared_count >= 8  # manifests and blobs
        subject = old_client.digest("team/app", "1")
        assert len(new_client.ask("GET", f"/v2/team/app/referrers/{subject}").json()["manifests"]) == 1
        assert PASSWORD not in entrepot_output("jobs", "list", "--json", "--data", str(new.data), folder=tmp_path)


def test_import_job_continues_after_a_restart(tmp_path: Path, content: UpstreamContent) -> None:
    """The API can import from an upstream in the settings. If the server is killed during the import job, the job
    continues after the next start."""
    with docker_registry(tmp_path, content) as old:
        config = tmp_path / "entrepot.toml"
        config.write_text(f'[[upstream]]\nname = "old.test"\nendpoints = ["{old.url}"]\n')
        with running_server(tmp_path, "--config", str(config)) as server:
            client = RegistryClient(server.address)
            body = json.dumps({"url": old.url, "include": ["team/**"]}).encode()
            reply = client.ask("POST", "/api/v1/imports/remote", body, {"Content-Type": "application/json"})
            assert reply.status == 202, reply.body
            job = reply.json()
            server.kill()
        with running_server(tmp_path, "--config", str(config)) as server:
            client = RegistryClient(server.address)
            while job["ended"] is None:
                time.sleep(0.05)
                job = client.ask("GET", f"/api/v1/jobs/{job['id']}").json()
            assert (job["state"], job["message"]) == ("done", "")
            assert catalog(client) == ["team/app"]
            assert client.digest("team/app", "1") == RegistryClient(old.address).digest("team/app", "1")
