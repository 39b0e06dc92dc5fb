"""The tried clients of artifacts: Helm (charts), oras (files) and cosign (signatures). None of them has a setting for a
mirror."""

from __future__ import annotations

import contextlib
import io
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.deploy.compatibility.client_steps import ClientSite, CompatibleClient, Step, version_in
from tests.fakes.client_images import image
from tests.fakes.clients.programs import ForeignProgram, environment
from tests.fakes.clients.registry_client import pull_all

HELM_PUSH = """
import sys
from helm_python.registry import RegistryClient
with RegistryClient(plain_http=True) as client:
    client.push(sys.argv[1], sys.argv[2], plain_http=True)
"""
HELM_PULL = """
import sys
from helm_python.registry import RegistryClient
with RegistryClient(plain_http=True) as client:
    client.pull(sys.argv[1], version="1.0.0", destination=sys.argv[2], plain_http=True)
"""
ORAS_PUSH = """
import sys
from oras.client import OrasClient
OrasClient(insecure=True).push(sys.argv[2], files=[sys.argv[1]], disable_path_validation=True)
"""
ORAS_PULL = """
import sys
from oras.client import OrasClient
OrasClient(insecure=True).pull(sys.argv[1], outdir=sys.argv[2])
"""


@contextlib.contextmanager
def helm(site: ClientSite) -> Iterator[CompatibleClient]:
    run, repository_url = _python(site), f"oci://{site.server.address}/helm"

    def push() -> None:
        run("-c", HELM_PUSH, str(_chart(site.new_folder(), "pushed")), repository_url)
        pull_all(site.wire, "helm/pushed", "1.0.0")

    def pull() -> None:
        chart, target = _chart(site.new_folder(), "pulled"), site.new_folder()
        run("-c", HELM_PUSH, str(chart), repository_url)
        run("-c", HELM_PULL, f"{repository_url}/pulled", str(target))
        assert (target / chart.name).read_bytes() == chart.read_bytes()

    yield CompatibleClient(_version(run, "helm_python_sdk"), {"push": push, "pull": pull})


@contextlib.contextmanager
def oras(site: ClientSite) -> Iterator[CompatibleClient]:
    run = ForeignProgram(("oras",), environment(site.new_folder() / "home"))
    in_folder = ForeignProgram(("sh", "-c", 'cd "$0" && exec oras "$@"'), run.env)

    def push(file: Path, name: str) -> None:
        in_folder(str(file.parent), "push", "--plain-http", name, file.name)

    def pull(name: str, target: Path) -> None:
        run("pull", "--plain-http", "--output", str(target), name)

    yield CompatibleClient(version_in(run("version").out), _file_steps(site, "oras", push, pull))


@contextlib.contextmanager
def oras_of_python(site: ClientSite) -> Iterator[CompatibleClient]:
    run = _python(site)

    def push(file: Path, name: str) -> None:
        run("-c", ORAS_PUSH, str(file), name)

    def pull(name: str, target: Path) -> None:
        run("-c", ORAS_PULL, name, str(target))

    yield CompatibleClient(_version(run, "oras"), _file_steps(site, "oras-py", push, pull))


@contextlib.contextmanager
def cosign(site: ClientSite) -> Iterator[CompatibleClient]:
    """Yields cosign as a client. Its push step signs an image, which pushes the signature. Its pull step verifies an
    image, which pulls the signature. The key is in a file, and no transparency log is used."""
    keys = site.new_folder()
    run = ForeignProgram(("cosign",), environment(site.new_folder() / "home", COSIGN_PASSWORD="secret"))
    run("generate-key-pair", "--output-key-prefix", str(keys / "key"))

    def signed(repo: str) -> str:
        """Pushes an image, signs it, and returns its name by digest."""
        signed_image = image(f"signed as {repo}")
        site.wire.push(repo, "1", signed_image)
        name = f"{site.server.address}/{repo}@{signed_image.digest}"
        run("sign", "--key", str(keys / "key.key"), "--tlog-upload=false", "--yes", name)
        return name

    def push() -> None:
        tag = signed("cosign/pushed").partition("@")[2].replace(":", "-") + ".sig"
        assert tag in site.wire.tags("cosign/pushed")
        pull_all(site.wire, "cosign/pushed", tag)

    def pull() -> None:
        public = ("--key", str(keys / "key.pub"), "--insecure-ignore-tlog=true", "--private-infrastructure=true")
        run("verify", *public, signed("cosign/pulled"))

    package = ForeignProgram(("dpkg-query", "--show", "--showformat", "${Version}", "cosign"), run.env)
    yield CompatibleClient(version_in(package().out), {"push": push, "pull": pull})


def _file_steps(
    site: ClientSite, client: str, push: Callable[[Path, str], None], pull: Callable[[str, Path], None]
) -> dict[str, Step]:
    """Returns the steps of a client of files. `push`: pushes a file under a name. `pull`: pulls a name into a
    folder."""

    def pushed(repo: str) -> bytes:
        file = site.new_folder() / "report.txt"
        file.write_text(f"report of {repo}\n")
        push(file, f"{site.server.address}/{repo}:1")
        return file.read_bytes()

    def push_own() -> None:
        body = pushed(f"{client}/pushed")
        pull_all(site.wire, f"{client}/pushed", "1")
        (layer,) = site.wire.manifest(f"{client}/pushed", "1").json()["layers"]
        assert site.wire.blob(f"{client}/pushed", layer["digest"]) == body

    def pull_own() -> None:
        body, target = pushed(f"{client}/pulled"), site.new_folder()
        pull(f"{site.server.address}/{client}/pulled:1", target)
        (pulled_file,) = [path for path in target.rglob("*") if path.is_file()]
        assert pulled_file.read_bytes() == body

    return {"push": push_own, "pull": pull_own}


def _python(site: ClientSite) -> ForeignProgram:
    """Returns this Python interpreter as a program. It has the packages of requirements/clients.txt."""
    return ForeignProgram((sys.executable, "-W", "ignore"), environment(site.new_folder() / "home"))


def _version(run: ForeignProgram, package: str) -> str:
    return run("-c", f"from importlib.metadata import version; print(version('{package}'))").out.strip()


def _chart(folder: Path, name: str) -> Path:
    """Writes the archive of a chart that installs nothing, and returns its path."""
    body = f"apiVersion: v2\nname: {name}\nversion: 1.0.0\n".encode()
    archive = folder / f"{name}-1.0.0.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        entry = tarfile.TarInfo(f"{name}/Chart.yaml")
        entry.size = len(body)
        tar.addfile(entry, io.BytesIO(body))
    return archive
