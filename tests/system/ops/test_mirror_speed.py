"""`entrepot mirror test` against two fake Hubs."""

from __future__ import annotations

import asyncio
import json
import socket
import tomllib
from pathlib import Path
from typing import Any

from registry.cli.diagnosis.endpoint_speed import measure_endpoint
from registry.config import Upstream
from storage.names import RepositoryName, Tag
from tests.fakes.client_images import MIB
from tests.fakes.commands import entrepot
from tests.fakes.hub.hub import hub
from tests.fakes.upstream_content import UpstreamContent, noise_image


def measured(folder: Path, *args: str) -> tuple[int, dict[str, Any], str]:
    done = entrepot("mirror", "test", "--json", *args, folder=folder)
    (result,) = json.loads(done.stdout)
    return done.returncode, result, done.stderr


def test_two_endpoints(tmp_path: Path) -> None:
    """The settings list the slow endpoint first. The command names the fast one, and the lines that it suggests are
    valid. A dead endpoint is reported and left out of them. Only a part of the layer is fetched."""
    content = UpstreamContent()
    held = content.add("library/alpine", noise_image("a", 1000, 12 * MIB), "latest")
    with hub(tmp_path, content, rate=MIB, latency=0.05) as slow, hub(tmp_path, content) as fast:
        settings = tmp_path / "entrepot.toml"
        text = '[[upstream]]\nname = "docker.io"\nendpoints = ["{}", "{}"]\n'
        settings.write_text(text.format(slow.url, fast.url))
        code, result, _ = measured(tmp_path, "-c", str(settings))
        assert code == 0
        one, other = result["endpoints"]
        assert (one["url"], other["url"], one["error"], other["error"]) == (slow.url, fast.url, None, None)
        assert other["bytes_per_second"] > 2 * one["bytes_per_second"]
        assert all(other[name] > 0 for name in ("connect", "first_byte", "manifest"))
        assert (other["tls"], other["bytes"]) == (None, 8 * MIB)
        assert f"{fast.url} is the fastest" in result["advice"]
        assert tomllib.loads(result["lines"])["upstream"][0]["endpoints"] == [fast.url, slow.url]
        assert max(stop for _, stop in fast.sent(held.layers[1].digest)) == 8 * MIB
        done = entrepot("mirror", "test", "-c", str(settings), "docker.io", folder=tmp_path)
        assert done.returncode == 0
        assert done.stdout.index(fast.url) < done.stdout.index(slow.url)
        settings.write_text(text.format(fast.url, slow.url))
        _, result, _ = measured(tmp_path, "-c", str(settings))
        assert "is the first already" in result["advice"]
        assert result["lines"] is None
        slow.refuse()
        code, result, _ = measured(tmp_path, "-c", str(settings))
        assert code == 0
        assert f"{slow.url} does not work" in result["advice"]
        assert tomllib.loads(result["lines"])["upstream"][0]["endpoints"] == [fast.url]
        fast.refuse()
        code, result, _ = measured(tmp_path, "-c", str(settings))
        assert (code, result["lines"]) == (1, None)
        assert "entrepot doctor" in result["advice"]


def test_a_slow_endpoint_works(tmp_path: Path) -> None:
    """A blob that is not complete within the time limit is measured by the bytes that have arrived, and is no error."""
    content = UpstreamContent()
    content.add("team/app", noise_image("c", 1000, 8 * MIB), "1")
    with hub(tmp_path, content, rate=MIB // 16) as slow:
        upstream = Upstream(name="corp.test", endpoints=[slow.url])
        image = RepositoryName("team/app"), Tag("1")
        speed = asyncio.run(measure_endpoint(upstream, slow.url, image, seconds=5.0))
        assert speed.error is None
        assert 0 < speed.bytes < 8 * MIB
        assert speed.bytes_per_second


def test_an_endpoint_that_does_not_answer() -> None:
    """The error names the time limit that was exceeded."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        upstream = Upstream(name="corp.test", endpoints=[url])
        speed = asyncio.run(measure_endpoint(upstream, url, None, seconds=0.2))
    assert speed.error == "no answer within 0.2 s"


def test_an_upstream_without_a_known_image(tmp_path: Path) -> None:
    """Connections are measured, and stderr says how to measure downloads too. `--endpoint` and `--image` select what is
    measured."""
    content = UpstreamContent()
    content.add("team/app", noise_image("b", 100_000), "1")
    with hub(tmp_path, content) as live:
        args = ("corp.test", "--mirror", "corp.test", "--endpoint", live.url)
        code, result, said = measured(tmp_path, *args)
        assert (code, result["endpoints"][0]["bytes_per_second"]) == (0, None)
        assert result["endpoints"][0]["first_byte"] > 0
        assert "--image NAME:TAG" in said
        _, result, _ = measured(tmp_path, *args, "--image", "team/app:1")
        assert result["endpoints"][0]["bytes"] == 100_000
        code, result, _ = measured(tmp_path, *args, "--image", "team/none:1")
        assert (code, "no such manifest" in result["endpoints"][0]["error"]) == (1, True)


def test_wrong_use(tmp_path: Path) -> None:
    """An unknown upstream and an endpoint that is no URL end the command with exit code 2."""
    for args in (["quay.io"], ["docker.io", "--endpoint", "ftp://x"], ["docker.io", "--image", "A B"]):
        done = entrepot("mirror", "test", "--mirror", "docker.io", *args, folder=tmp_path)
        assert done.returncode == 2, done.stdout
        assert "Traceback" not in done.stderr
