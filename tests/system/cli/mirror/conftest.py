"""Fixtures and helpers for the tests of `entrepot mirror`: a fake upstream with two repositories, and functions that
run the command in a folder with settings for this upstream."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.client_images import MIB
from tests.fakes.commands import STACK_DUMP, entrepot
from tests.fakes.hub.hub import Hub, hub
from tests.fakes.plain_client import plain_request
from tests.fakes.server_process import ROOT, RegistryServer
from tests.fakes.upstream_content import ImageTree, UpstreamContent, index_of, noise_image

FOR_AMD64 = ("--platform", "linux/amd64")


@pytest.fixture
def images() -> dict[str, ImageTree]:
    """Returns an index, and the two images that it lists for two platforms."""
    amd64, arm64 = noise_image("amd64", 1000, 3 * MIB), noise_image("arm64", 2000, MIB, architecture="arm64")
    return {"amd64": amd64, "arm64": arm64, "index": index_of((amd64, "amd64"), (arm64, "arm64"))}


@pytest.fixture
def upstream(tmp_path: Path, images: dict[str, ImageTree]) -> Iterator[Hub]:
    """Runs an upstream. Writes settings for a mirror of it into the folder of the test."""
    content = UpstreamContent()
    content.add("library/app", images["index"], "1", "latest")
    content.add("team/tool", noise_image("tool", 500), "2")
    with hub(tmp_path, content) as running:
        (tmp_path / "entrepot.toml").write_text(settings(running))
        yield running


def settings(upstream: Hub, more: str = "") -> str:
    """Returns the settings for a mirror of this upstream, followed by `more`."""
    return f'[[upstream]]\nname = "docker.io"\ndefault = true\nendpoints = ["{upstream.url}"]\ntag_ttl = "1h"\n{more}'


def run_mirror(folder: Path, *args: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs `entrepot mirror` with these arguments to its end."""
    return entrepot("mirror", *args, "--config", "entrepot.toml", folder=folder)


def output_of(folder: Path, *args: str | Path) -> list[str]:
    """Runs `entrepot mirror`, which must succeed without errors. Returns the lines of its output."""
    result = run_mirror(folder, *args)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout.splitlines()


def status(folder: Path) -> dict[str, Any]:
    """Returns the JSON output of `entrepot mirror status`."""
    document: dict[str, Any] = json.loads("\n".join(output_of(folder, "status", "--json")))
    return document


def requested_blobs(upstream: Hub) -> set[str | None]:
    """Returns the digests of the blobs that were requested from the upstream."""
    return {request.digest for request in upstream.requests("blob", "GET")}


def start_mirror(folder: Path, *args: str, stderr: int = subprocess.PIPE) -> subprocess.Popen[str]:
    """Starts `entrepot mirror` with these arguments, and does not wait for its end."""
    return subprocess.Popen(
        [sys.executable, "-m", "registry", "mirror", *args, "--config", "entrepot.toml"],
        cwd=folder,
        env={
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": f"{STACK_DUMP}:{ROOT}",
            "HOME": str(folder),
            "TERM": "xterm",
            "COLUMNS": "120",
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )


def digests_served(server: RegistryServer, path: str = "/v2/app/manifests/1") -> set[str]:
    """Returns the digests in the responses of the server. Sends so many requests that every worker gets some. No
    response may have a warning."""
    found = set()
    for _ in range(16):
        answer = plain_request("HEAD", f"{server.url}{path}")
        assert "warning" not in answer.headers
        found.add(answer.headers["docker-content-digest"])
    return found
