"""Tests of `entrepot scrub` while a server runs, and of the API for scrub. A scrub reads all blobs and moves damaged
ones to the quarantine."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from storage.data_dir.layout import Layout
from storage.names import Digest
from tests.fakes.admin_site import ADMIN, PASSWORD, AdminSite, code_of
from tests.fakes.client_images import ClientImage, digest_of, image
from tests.fakes.clients.registry_client import RegistryClient, assert_same_files
from tests.fakes.commands import entrepot, entrepot_output, error_line, json_lines
from tests.fakes.mirror_site import wait_until
from tests.fakes.plain_client import plain_client
from tests.fakes.scrub_runs import flip_byte
from tests.fakes.server_process import running_server


@pytest.fixture
def site(tmp_path: Path) -> Iterator[AdminSite]:
    """Runs a server with two workers, the admin root, and a grant for everyone to pull and push. All images have
    the same first layer, which tests damage, so each test has its own server."""
    folder = tmp_path
    entrepot_output("user", "add", ADMIN, "--admin", "--password-file", "-", folder=folder, stdin_text=PASSWORD)
    entrepot_output("grant", "add", "**", "pull,push", "everyone", folder=folder)
    with running_server(folder, workers=2) as server:
        yield AdminSite(server, folder)


@pytest.fixture
def admin_client(site: AdminSite) -> RegistryClient:
    """Returns a client that sends requests with the login of the admin."""
    credentials = b64encode(f"{ADMIN}:{PASSWORD}".encode()).decode()
    return RegistryClient(site.server.address, f"Basic {credentials}")


def push(admin_client: RegistryClient, repo: str) -> ClientImage:
    pushed_image = image(f"hello from {repo}")
    admin_client.push(repo, "latest", pushed_image)
    return pushed_image


def layer_file(site: AdminSite, pushed_image: ClientImage) -> Path:
    """Returns the file of the first layer of the image."""
    return Layout(site.server.data).blob(Digest(pushed_image.layers[0].digest))


def scrub_json(site: AdminSite, *more: str, code: int) -> list[dict[str, Any]]:
    """Runs `entrepot scrub --json`, and checks its exit code. Returns the JSON lines."""
    result = entrepot("scrub", "--json", *more, folder=site.folder)
    assert result.returncode == code, result.stderr
    return json_lines(result.stdout)


def test_push_replaces_a_blob_that_scrub_found_damaged(site: AdminSite, admin_client: RegistryClient) -> None:
    """`entrepot scrub` finds a damaged layer: it exits with 1 and prints a JSON line for the blob. Every worker then
    responds to a HEAD of the blob with 404, so a client pushes the layer again. After the push, the image is complete.
    The API, `scrub status` and the quarantine list the blob."""
    pushed_image = push(admin_client, "scrubbed/one")
    digest = pushed_image.layers[0].digest
    assert admin_client.blob_status("scrubbed/one", digest) == 200
    assert [step["event"] for step in scrub_json(site, code=0)] == ["done"]
    flip_byte(layer_file(site, pushed_image))

    found, summary = scrub_json(site, "--rate", "1GiB", code=1)

    assert (found["event"], found["kind"], found["digest"]) == ("damaged", "blob", digest)
    assert found["repositories"] == ["scrubbed/one"]
    assert (summary["event"], summary["damaged"], summary["still_damaged"]) == ("done", 1, 1)
    assert {admin_client.blob_status("scrubbed/one", digest) for _ in range(6)} == {404}
    [listed] = site.call_ok("GET", "/damaged")["items"]
    assert (listed["digest"], listed["repositories"]) == (digest, ["scrubbed/one"])
    status = json.loads(site.command("scrub", "status", "--json"))
    assert [blob["digest"] for blob in status["damaged_blobs"]] == [digest]
    assert [each["damaged"] for each in status["rounds"][:2]] == [1, 0]
    assert digest in site.command("scrub", "status")
    [quarantined] = site.call_ok("GET", "/quarantine")
    assert (quarantined["digest"], quarantined["damaged"]) == (digest, True)
    assert (site.server.data / quarantined["place"]).exists()

    [summary] = scrub_json(site, code=1)
    assert (summary["damaged"], summary["still_damaged"]) == (0, 1)

    admin_client.push("scrubbed/one", "latest", pushed_image)

    assert_same_files(admin_client, "scrubbed/one", "latest", pushed_image)
    assert site.call_ok("GET", "/damaged")["items"] == []
    [quarantined] = json.loads(site.command("scrub", "quarantine", "list", "--json"))
    assert (quarantined["digest"], quarantined["damaged"]) == (digest, False)
    site.command("scrub", "quarantine", "delete", digest)
    assert site.call_ok("GET", "/quarantine") == []
    assert code_of(site.call("DELETE", f"/quarantine/{digest}")) == "BLOB_UNKNOWN"
    assert code_of(site.call("DELETE", "/quarantine/other")) == "DIGEST_INVALID"
    actions = [line["action"] for line in site.call_ok("GET", "/audit", target="scrubbed/one", limit=20)["items"]]
    assert actions.index("blob.healed") < actions.index("blob.damaged")


def test_workers_serve_no_damaged_bytes_from_memory(site: AdminSite, admin_client: RegistryClient) -> None:
    """A worker serves repeated GETs of a small blob from memory. After another process has found by a scrub that the
    blob is damaged, the worker responds with 404 on the same connection."""
    pushed_image = push(admin_client, "scrubbed/small")
    assert pushed_image.config is not None
    digest = digest_of(pushed_image.config.body)
    path = f"/v2/scrubbed/small/blobs/{digest}"
    with plain_client(site.server.url, timeout=60) as client:
        for _ in range(5):
            assert client.get(path, auth=(ADMIN, PASSWORD)).content == pushed_image.config.body
        flip_byte(Layout(site.server.data).blob(Digest(digest)))
        found, _ = scrub_json(site, code=1)
        assert found["digest"] == digest
        assert client.get(path, auth=(ADMIN, PASSWORD)).status_code == 404
        admin_client.push("scrubbed/small", "latest", pushed_image)
        assert client.get(path, auth=(ADMIN, PASSWORD)).content == pushed_image.config.body


def test_scrub_by_the_api(site: AdminSite, admin_client: RegistryClient) -> None:
    """A POST adds a scrub job, which a worker runs. While a job waits or runs, the API refuses a second job and the
    command fails. The error of the command says who started the job."""
    pushed_image = push(admin_client, "scrubbed/two")
    flip_byte(layer_file(site, pushed_image))
    slow = site.call_ok("POST", "/scrub", {"rate": 1})
    wait_until(lambda: site.call_ok("GET", f"/jobs/{slow['id']}")["state"] == "running", "no worker runs the job")
    refused = site.call("POST", "/scrub", {})
    assert (refused.status_code, code_of(refused)) == (409, "JOB_RUNNING")
    assert site.call_ok("GET", "/scrub")["job"]["id"] == slow["id"]
    line = error_line(entrepot("scrub", folder=site.folder), 1)
    assert f"root is running scrub already (job {slow['id']}" in line
    site.call_ok("POST", f"/jobs/{slow['id']}/stop", {})
    wait_until(lambda: site.call_ok("GET", f"/jobs/{slow['id']}")["state"] == "stopped", "the job does not stop")

    job = site.call_ok("POST", "/scrub", {})
    wait_until(lambda: site.call_ok("GET", f"/jobs/{job['id']}")["ended"], "the job does not end")

    assert [each["digest"] for each in site.call_ok("GET", "/damaged")["items"]] == [pushed_image.layers[0].digest]
    assert site.call_ok("GET", "/scrub")["rounds"][0]["ended"] is not None
    assert site.call("POST", "/scrub", {"rate": 0}).status_code == 422
    admin_client.push("scrubbed/two", "latest", pushed_image)


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        (("--rate", "fast"), "--rate: 'fast' is not a size"),
        (("--rate", "0"), "--rate: '0' is not a size"),
        (("--json", "status"), "write the options after the subcommand: entrepot scrub status"),
    ],
)
def test_bad_usage(tmp_path: Path, args: tuple[str, ...], problem: str) -> None:
    """With wrong arguments, the command fails with one line."""
    assert problem in error_line(entrepot("scrub", *args, folder=tmp_path), 2)
