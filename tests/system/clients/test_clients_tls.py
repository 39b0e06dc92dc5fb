"""Real clients over TLS, which trust an authority of their own and send a client certificate."""

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
    """A server that accepts only clients with a certificate."""
    pair = authority.sign("localhost")
    settings = {"CERTIFICATE": pair.certificate, "KEY": pair.key, "CLIENT_CA": authority.certificate}
    with running_server(tmp_path, env={f"ENTREPOT_TLS__{name}": str(path) for name, path in settings.items()}) as it:
        yield it


@pytest.fixture
def folder(tmp_path: Path, authority: CertificateAuthority) -> Path:
    """The folder for the clients' `--cert-dir`, which is the same as docker's `certs.d/HOST`."""
    own = authority.sign("client", client=True)
    made = tmp_path / "certs"
    made.mkdir()
    files = ((authority.certificate, "ca.crt"), (own.certificate, "client.cert"), (own.key, "client.key"))
    for source, name in files:
        shutil.copy(source, made / name)
    return made


@pytest.fixture
def some() -> ClientImage:
    return image("tls", layer({"a": noise("tls", 3 * MIB)}))


def test_skopeo(tools: ContainerTools, server: RegistryServer, folder: Path, some: ClientImage, tmp_path: Path) -> None:
    """skopeo pushes and pulls an image byte by byte. Without the certificate, it gets nothing."""
    write_layout(tmp_path / "in", {"x": some})
    name = f"docker://{server.address}/team/app:1"
    tools.skopeo("copy", "--dest-cert-dir", str(folder), f"oci:{tmp_path / 'in'}:x", name)
    tools.skopeo("copy", "--src-cert-dir", str(folder), name, f"oci:{tmp_path / 'out'}:x")
    assert blobs_below(tmp_path / "out") == {d: c.body for d, c in (some.manifests | some.blobs).items()}
    for missing in ("client.cert", "client.key"):
        (folder / missing).unlink()
    assert tools.skopeo.attempt("inspect", "--cert-dir", str(folder), name).code != 0


def test_podman(tools: ContainerTools, server: RegistryServer, folder: Path, some: ClientImage, tmp_path: Path) -> None:
    """podman pulls an image, and pushes it under another name."""
    write_layout(tmp_path / "in", {"x": some})
    name = f"{server.address}/team/app"
    tools.skopeo("copy", "--dest-cert-dir", str(folder), f"oci:{tmp_path / 'in'}:x", f"docker://{name}:1")
    tools.podman("pull", "--quiet", "--cert-dir", str(folder), f"{name}:1")
    tools.podman("push", "--quiet", "--cert-dir", str(folder), f"{name}:1", f"{name}:2")
    tools.skopeo("inspect", "--cert-dir", str(folder), f"docker://{name}:2")
    assert "Traceback" not in server.log_text()
