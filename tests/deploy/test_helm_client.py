"""Tests that Helm can store charts in this registry."""

from __future__ import annotations

from pathlib import Path

import helm_python
import yaml

from tests.deploy.rendered_chart import CHART
from tests.fakes.commands import entrepot_output
from tests.fakes.server_process import running_server

PASSWORD = "correct horse battery"


def test_helm_pushes_and_pulls_a_chart(tmp_path: Path) -> None:
    """After a login, Helm can push a chart, list its versions, and pull it with the same bytes."""
    entrepot_output("user", "add", "admin", "--admin", "--password-file", "-", folder=tmp_path, stdin_text=PASSWORD)
    package = Path(helm_python.package(CHART, destination=tmp_path))
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["version"]
    (tmp_path / "pulled").mkdir()
    with (
        running_server(tmp_path, workers=1) as server,
        helm_python.RegistryClient(plain_http=True, credentials_file=tmp_path / "logins.json") as client,
    ):
        chart = f"oci://{server.address}/charts/entrepot"
        client.login(server.address, "admin", PASSWORD, plain_http=True)
        client.push(package, f"oci://{server.address}/charts", plain_http=True)
        assert client.tags(chart) == [version]
        client.pull(chart, destination=tmp_path / "pulled", version=version, plain_http=True)
    assert (tmp_path / "pulled" / package.name).read_bytes() == package.read_bytes()
