"""Tests of `entrepot mirror test`, which measures the speed of the endpoints of an upstream, with two fake Docker
Hubs."""

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
    """Runs the command. Returns its exit code, its result for the only upstream, and its stderr."""
    process = entrepot("mirror", "test", "--json", *args, folder=folder)
    (result,) = json.loads(process.stdout)
    return process.returncode, result, process.stderr


def test_fast_endpoint_is_recommended(tmp_path: Path) -> None:
    """The settings list a slow endpoint first and a fast one second. The command recommends the fast endpoint, and
    suggests valid lines for the settings. It reports a dead endpoint and leaves it out of these lines. It fetches only
    a part of a layer."""
    content = UpstreamContent()
    image = content.add("library/alpine", noise_image("a", 1000, 12 * MIB), "latest")
    with hub(tmp_path, content, rate=MIB, latency=0.05) as slow, hub(tmp_path, content) as fast:
        settings = tmp_path / "entrepot.toml"
        text = '[[upstream]]\nname = "docker.io"\nendpoints = ["{}", "{}"]\n'
        settings.write_text(text.format(slow.url, fast.url))
        exit_code, result, _ = measured(tmp_path, "-c", str(settings))
        assert exit_code == 0
        slow_result, fast_result = result["endpoints"]
        assert (slow_result["url"], fast_result["url"], slow_result["error"], fast_result["error"]) == (
            slow.url,
            fast.url,
            None,
            None,
        )
        assert fast_result["bytes_per_second"] > 2 * slow_result["bytes_per_second"]
        assert all(fast_result[name] > 0 for name in ("connect", "first_byte", "manifest"))
        assert (fast_result["tls"], fast_result["bytes"]) == (None, 8 * MIB)
        assert f"{fast.url} is the fastest" in result["advice"]
        assert tomllib.loads(result["lines"])["upstream"][0]["endpoints"] == [fast.url, slow.url]
        assert max(stop for _, stop in fast.sent_ranges(image.layers[1].digest)) == 8 * MIB
        process = entrepot("mirror", "test", "-c", str(settings), "docker.io", folder=tmp_path)
        assert process.returncode == 0
        assert process.stdout.index(fast.url) < process.stdout.index(slow.url)
        settings.write_text(text.format(fast.url, slow.url))
        _, result, _ = measured(tmp_path, "-c", str(settings))
        assert "is already the first endpoint" in result["advice"]
        assert result["lines"] is None
        slow.refuse()
        exit_code, result, _ = measured(tmp_path, "-c", str(settings))
        assert exit_code == 0
        assert f"{slow.url} does not work" in result["advice"]
        assert tomllib.loads(result["lines"])["upstream"][0]["endpoints"] == [fast.url]
        fast.refuse()
        exit_code, result, _ = measured(tmp_path, "-c", str(settings))
        assert (exit_code, result["lines"]) == (1, None)
        assert "entrepot doctor" in result["advice"]


def test_slow_endpoint_is_no_error(tmp_path: Path) -> None:
    """If a blob is not complete within the time limit, the speed is calculated from the bytes that have arrived. This
    is not an error."""
    content = UpstreamContent()
    content.add("team/app", noise_image("c", 1000, 8 * MIB), "1")
    with hub(tmp_path, content, rate=MIB // 16) as slow:
        upstream = Upstream(name="corp.test", endpoints=[slow.url])
        image = RepositoryName("team/app"), Tag("1")
        speed = asyncio.run(measure_endpoint(upstream, slow.url, image, seconds=5.0))
        assert speed.error is None
        assert 0 < speed.blob_bytes < 8 * MIB
        assert speed.bytes_per_second


def test_silent_endpoint() -> None:
    """If an endpoint does not respond, the error states the time limit."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        upstream = Upstream(name="corp.test", endpoints=[url])
        speed = asyncio.run(measure_endpoint(upstream, url, None, seconds=0.2))
    assert speed.error == "no answer within 0.2 s"


def test_upstream_without_a_known_image(tmp_path: Path) -> None:
    """For an upstream without a known image, only the connections are measured, and stderr explains how to measure
    downloads. `--image` selects an image, and `--endpoint` an endpoint."""
    content = UpstreamContent()
    content.add("team/app", noise_image("b", 100_000), "1")
    with hub(tmp_path, content) as live:
        args = ("corp.test", "--mirror", "corp.test", "--endpoint", live.url)
        exit_code, result, errors = measured(tmp_path, *args)
        assert (exit_code, result["endpoints"][0]["bytes_per_second"]) == (0, None)
        assert result["endpoints"][0]["first_byte"] > 0
        assert "--image NAME:TAG" in errors
        _, result, _ = measured(tmp_path, *args, "--image", "team/app:1")
        assert result["endpoints"][0]["bytes"] == 100_000
        exit_code, result, _ = measured(tmp_path, *args, "--image", "team/none:1")
        assert (exit_code, "no such manifest" in result["endpoints"][0]["error"]) == (1, True)


def test_invalid_arguments(tmp_path: Path) -> None:
    """An unknown upstream, an endpoint that is not a URL, and an invalid image name end the command with exit code
    2."""
    for args in (["quay.io"], ["docker.io", "--endpoint", "ftp://x"], ["docker.io", "--image", "A B"]):
        process = entrepot("mirror", "test", "--mirror", "docker.io", *args, folder=tmp_path)
        assert process.returncode == 2, process.stdout
        assert "Traceback" not in process.stderr
