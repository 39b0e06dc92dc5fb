"""An upstream over HTTP with two repositories, and the command `entrepot mirror` on a data directory."""

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
    """An index of two images for two platforms, and an image without an index."""
    amd64, arm64 = noise_image("amd64", 1000, 3 * MIB), noise_image("arm64", 2000, MIB, architecture="arm64")
    return {"amd64": amd64, "arm64": arm64, "index": index_of((amd64, "amd64"), (arm64, "arm64"))}


@pytest.fixture
def upstream(tmp_path: Path, images: dict[str, ImageTree]) -> Iterator[Hub]:
    content = UpstreamContent()
    content.add("library/app", images["index"], "1", "latest")
    content.add("team/tool", noise_image("tool", 500), "2")
    with hub(tmp_path, content) as running:
        (tmp_path / "entrepot.toml").write_text(settings(running))
        yield running


def settings(upstream: Hub, more: str = "") -> str:
    return f'[[upstream]]\nname = "docker.io"\ndefault = true\nendpoints = ["{upstream.url}"]\ntag_ttl = "1h"\n{more}'


def mirror(folder: Path, *args: str | Path) -> subprocess.CompletedProcess[str]:
    return entrepot("mirror", *args, "--config", "entrepot.toml", folder=folder)


def done(folder: Path, *args: str | Path) -> list[str]:
    """Returns the output lines of a command that must succeed."""
    ended = mirror(folder, *args)
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout.splitlines()


def status(folder: Path) -> dict[str, Any]:
    seen: dict[str, Any] = json.loads("\n".join(done(folder, "status", "--json")))
    return seen


def blobs_asked_for(upstream: Hub) -> set[str | None]:
    return {seen.digest for seen in upstream.requests("blob", "GET")}


def started(folder: Path, *args: str, stderr: int = subprocess.PIPE) -> subprocess.Popen[str]:
    """Starts the command."""
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
    """Returns the digests in the responses of all workers, over several connections."""
    found = set()
    for _ in range(16):
        answer = plain_request("HEAD", f"{server.url}{path}")
        assert "warning" not in answer.headers
        found.add(answer.headers["docker-content-digest"])
    return found
