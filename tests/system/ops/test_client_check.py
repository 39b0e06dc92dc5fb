"""Tests that `entrepot client check` agrees with skopeo, a real client: with a configuration in which the command finds
a problem, skopeo does not reach the registry, and with the lines that the command suggests, it does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.clients.container_tools import container_tools
from tests.fakes.commands import entrepot
from tests.fakes.hub.hub import hub
from tests.fakes.server_process import RegistryServer, running_server
from tests.fakes.upstream_content import UpstreamContent, noise_image

# By name: the content of the configuration file, and a part of the problem that the command reports.
WRONG_CONFIGURATIONS = {
    "none": ("", "no file of podman has a [[registry]] for docker.io"),
    "without insecure": (
        '[[registry]]\nlocation = "docker.io"\n[[registry.mirror]]\nlocation = "HOST/docker.io"\n',
        "lacks insecure = true",
    ),
    "wrong path": (
        '[[registry]]\nlocation = "docker.io"\n[[registry.mirror]]\nlocation = "HOST/hub"\ninsecure = true\n',
        "has the wrong path",
    ),
    "only by digest": (
        '[[registry]]\nlocation = "docker.io"\nmirror-by-digest-only = true\n'
        '[[registry.mirror]]\nlocation = "HOST/docker.io"\ninsecure = true\n',
        "only for pulls by digest",
    ),
}


def run_check(server: RegistryServer, root: Path) -> tuple[int, list[dict[str, Any]]]:
    """Runs `entrepot client check`. Returns its exit code and its findings."""
    process = entrepot("client", "check", "podman", "--url", server.url, "--root", root, "--json", folder=root)
    return process.returncode, json.loads(process.stdout)["findings"]


@pytest.mark.slow
@pytest.mark.parametrize("case", WRONG_CONFIGURATIONS)
def test_skopeo_agrees(tmp_path: Path, case: str) -> None:
    """skopeo reads the same configuration as the command. As long as the command finds a problem, skopeo gets no image
    through the registry. With the suggested lines it gets the image."""
    content = UpstreamContent()
    image = content.add("library/app", noise_image("a", 1000), "1")
    tools = container_tools(tmp_path)
    root = tmp_path / "root"
    checked_conf = root / "etc" / "containers" / "registries.conf"
    checked_conf.parent.mkdir(parents=True)
    # The file that skopeo reads.
    skopeo_conf = tmp_path / "home" / ".config" / "containers" / "registries.conf.d" / "50-entrepot.conf"
    skopeo_conf.parent.mkdir()
    with hub(tmp_path, content) as upstream:
        settings = tmp_path / "entrepot.toml"
        settings.write_text(f'[[upstream]]\nname = "docker.io"\ndefault = true\nendpoints = ["{upstream.url}"]\n')
        with running_server(tmp_path, "--config", str(settings), workers=1) as server:
            text, problem = WRONG_CONFIGURATIONS[case]
            for file in (checked_conf, skopeo_conf):
                file.write_text(text.replace("HOST", server.address))
            exit_code, findings = run_check(server, root)
            first = next(finding for finding in findings if finding["level"] == "problem")
            assert (exit_code, problem in first["what"]) == (1, True), findings
            assert tools.skopeo.attempt("inspect", "--raw", "docker://docker.io/library/app:1").code != 0
            assert [request for request in upstream.requests("manifest") if request.status == 200] == []
            lines = next(finding["lines"] for finding in findings if finding["lines"])
            if first["lines"] is None:  # for this problem, the command suggests to remove a line
                lines = checked_conf.read_text().replace("mirror-by-digest-only = true\n", "")
            for file in (checked_conf, skopeo_conf):
                file.write_text(lines)
            assert any("come through" in finding["what"] for finding in run_check(server, root)[1])
            assert tools.skopeo("inspect", "--raw", "docker://docker.io/library/app:1").out.encode() == image.body
