"""Tests with real clients over TLS. The clients trust a private certificate authority and send a client certificate."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.certificate_authority import CertificateAuthority
from tests.fakes.client_images import MIB, ClientImage, image, layer, noise, write_layout
from tests.fakes.clients.container_tools import ContainerTools
from tests.fakes.server_process import RegistryServer, running_server

from .test_skopeo import blobs_below


@pytest.fixture
def authority(tmp_path: Path) -> CertificateAuthority:
    return CertificateAuthority(tmp_path)


@pytest.fixture
def server(tmp_path: Path, authority: CertificateAuthority) -> Iterator[RegistryServer]:
    """Runs a server that accepts only clients with a certificate."""
    pair = authority.sign("localhost")
    settings = {"CERTIFICATE": pair.certificate, "KEY": pair.key, "CLIENT_CA": authority.certificate}
    with running_server(
        tmp_path, env={f"ENTREPOT_TLS__{name}": str(path) for name, path in settings.items()}
    ) as running:
        yield running


@pytest.fixture
def folder(tmp_path: Path, authority: CertificateAuthority) -> Path:
    """Returns a folder for the option `--cert-dir` of the clients. It has the same files as docker's folder
    `certs.d/HOST`."""
    client_pair = authority.sign("client", client=True)
    certificates_folder = tmp_path / "certs"
    certificates_folder.mkdir()
    files = (
        (authority.certificate, "ca.crt"),
        (client_pair.certificate, "client.cert"),
        (client_pair.key, "client.key"),
    )
    for source, name in files:
        shutil.copy(source, certificates_folder / name)
    return certificates_folder


@pytest.fixture
def pushed_image() -> ClientImage:
    return image("tls", layer({"a": noise("tls", 3 * MIB)}))


def test_skopeo(
    tools: ContainerTools, server: RegistryServer, folder: Path, pushed_image: ClientImage, tmp_path: Path
) -> None:
    """skopeo pushes an image and pulls it again without a change. Without its client certificate, it fails."""
    write_layout(tmp_path / "in", {"x": pushed_image})
    name = f"docker://{server.address}/team/app:1"
    tools.skopeo("copy", "--dest-cert-dir", str(folder), f"oci:{tmp_path / 'in'}:x", name)
    tools.skopeo("copy", "--src-cert-dir", str(folder), name, f"oci:{tmp_path / 'out'}:x")
    assert blobs_below(tmp_path / "out") == {
        d: c.body for d, c in (pushed_image.manifests | pushed_image.blobs).items()
    }
    for missing in ("client.cert", "client.key"):
        (folder / missing).unlink()
    assert tools.skopeo.attempt("inspect", "--cert-dir", str(folder), name).code != 0


def test_podman(
    tools: ContainerTools, server: RegistryServer, folder: Path, pushed_image: ClientImage, tmp_path: Path
) -> None:
    """podman pulls an image, and pushes it under another name."""
    write_layout(tmp_path / "in", {"x": pushed_image})
    name = f"{server.address}/team/app"
    tools.skopeo("copy", "--dest-cert-dir", str(folder), f"oci:{tmp_path / 'in'}:x", f"docker://{name}:1")
    tools.podman("pull", "--quiet", "--cert-dir", str(folder), f"{name}:1")
    tools.podman("push", "--quiet", "--cert-dir", str(folder), f"{name}:1", f"{name}:2")
    tools.skopeo("inspect", "--cert-dir", str(folder), f"docker://{name}:2")
    assert "Traceback" not in server.log_text()
