"""Archives with a data directory of each released version. Tests check that later versions can read them.

`python -m tests.fakes.released_directory` writes the archive of this version (`make record-data`). An archive has
`data`, the data directory of a server after some pushes, and `content.json`, which lists its content
(`DirectoryContent`).
"""

from __future__ import annotations

import base64
import io
import json
import tarfile
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

from registry import __version__
from tests.fakes.admin_site import ADMIN, PASSWORD, AdminSite
from tests.fakes.clients.registry_client import RegistryClient, pull_all
from tests.fakes.commands import entrepot_output
from tests.fakes.hub.hub import hub
from tests.fakes.raw_pushes import OCI_EMPTY, OCI_INDEX, OCI_MANIFEST, describe, digest_of, encode, image
from tests.fakes.server_process import ROOT, running_server
from tests.fakes.upstream_content import UpstreamContent, noise_image

ARCHIVES = ROOT / "tests" / "data" / "released"
SETTINGS = '[[upstream]]\nname = "docker.io"\ndefault = true\nendpoints = ["{url}"]\n'
HOSTED, CACHED = "team/app", "docker.io/library/ubuntu"


@dataclass
class DirectoryContent:
    """The content of a recorded directory. Later versions may add fields; a new field needs a default for older
    archives."""

    tags: dict[str, dict[str, str]] = field(default_factory=dict)
    """The digest of each tag of each repository."""
    history: list[str] = field(default_factory=list)
    """The digests at which `team/app:latest` has pointed, the newest first."""
    referrers: list[str] = field(default_factory=list)
    """The digests of the manifests that refer to `team/app:1`."""
    deleted: str = ""
    """The digest at which the deleted tag `team/app:old` pointed."""
    robot: str = ""
    """The secret of an API token of the robot `ci`, which may pull `team/**`."""


def basic(name: str, secret: str) -> str:
    """Returns the value of the Authorization header for an account."""
    return "Basic " + base64.b64encode(f"{name}:{secret}".encode()).decode()


def settings(folder: Path, upstream: str) -> Path:
    """Writes a settings file for a mirror of `docker.io`. `upstream`: the URL at which the mirror finds docker.io."""
    file = folder / "entrepot.toml"
    file.write_text(SETTINGS.format(url=upstream))
    return file


def record(archive: Path) -> None:
    """Runs a server of this version, pushes and pulls content through it, stops it, and packs its data directory into
    the file `archive`."""
    upstream = UpstreamContent()
    upstream.add("library/ubuntu", noise_image("ubuntu", 3000, 20_000), "24.04")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        entrepot_output("user", "add", ADMIN, "--admin", "--password-file", "-", folder=folder, stdin_text=PASSWORD)
        with (
            hub(folder, upstream) as upstream_hub,
            running_server(folder, "--config", str(settings(folder, upstream_hub.url))) as server,
        ):
            content = _fill(AdminSite(server, folder))
        _pack(folder / "data", content, archive)


def _fill(site: AdminSite) -> DirectoryContent:
    wire, content = RegistryClient(site.server.address, basic(ADMIN, PASSWORD)), DirectoryContent()
    for version in ("old", "1", "2"):
        layers = [f"{version} {number} ".encode() * 500 for number in range(2)]
        digest = _push(wire, HOSTED, [version, "latest"], encode({"os": "linux", "version": version}), *layers)
        content.history.insert(0, digest)
        content.tags.setdefault(HOSTED, {})[version] = digest
    content.tags[HOSTED]["latest"] = content.history[0]
    content.deleted = content.tags[HOSTED].pop("old")
    assert wire.ask("DELETE", f"/v2/{HOSTED}/manifests/old").status == 202
    content.tags[HOSTED]["all"] = _push_index(wire, HOSTED, "all", ["1", "2"])
    content.referrers.append(_push_signature(wire, HOSTED, "1"))
    pull_all(wire, CACHED, "24.04")
    content.tags[CACHED] = {"24.04": wire.digest(CACHED, "24.04")}
    site.call_ok("POST", "/users", {"name": "alice", "password": PASSWORD})
    site.call_ok("PUT", "/grants", {"subject": "user:alice", "pattern": "team/**", "actions": ["pull", "push"]})
    site.call_ok("POST", "/robots", {"name": "ci"})
    site.call_ok("PUT", "/grants", {"subject": "robot:ci", "pattern": "team/**", "actions": ["pull"]})
    content.robot = site.token("ci")
    return content


def _push(wire: RegistryClient, repo: str, tags: list[str], config: bytes, *layers: bytes) -> str:
    """Pushes an image under each of the tags, and returns its digest."""
    for blob in (config, *layers):
        _push_blob(wire, repo, blob)
    body = image(config, *layers)
    for tag in tags:
        _put(wire, repo, tag, body, OCI_MANIFEST)
    return digest_of(body)


def _push_index(wire: RegistryClient, repo: str, tag: str, children: list[str]) -> str:
    images = [describe(wire.manifest(repo, child).body, OCI_MANIFEST) for child in children]
    body = encode({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": images})
    _put(wire, repo, tag, body, OCI_INDEX)
    return digest_of(body)


def _push_signature(wire: RegistryClient, repo: str, subject: str) -> str:
    """Pushes an artifact that refers to the image with the tag `subject`."""
    _push_blob(wire, repo, b"{}")
    body = encode(
        {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "artifactType": "application/vnd.example.signature",
            "config": describe(b"{}", OCI_EMPTY),
            "layers": [describe(b"{}", OCI_EMPTY)],
            "subject": describe(wire.manifest(repo, subject).body, OCI_MANIFEST),
        }
    )
    _put(wire, repo, digest_of(body), body, OCI_MANIFEST)
    return digest_of(body)


def _push_blob(wire: RegistryClient, repo: str, blob: bytes) -> None:
    pushed = wire.ask("POST", f"/v2/{repo}/blobs/uploads/?digest={digest_of(blob)}", blob)
    assert pushed.status == 201, pushed.body


def _put(wire: RegistryClient, repo: str, reference: str, body: bytes, media_type: str) -> None:
    put = wire.ask("PUT", f"/v2/{repo}/manifests/{reference}", body, {"Content-Type": media_type})
    assert put.status == 201, put.body


def _pack(data: Path, content: DirectoryContent, archive: Path) -> None:
    """Packs the data directory and its description into an archive. Leaves out the disk reserve, a file of 16 MiB that
    the next start of a server creates again."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:gz", format=tarfile.PAX_FORMAT) as tar:
        tar.add(data, "data", filter=lambda entry: None if entry.name == "data/reserve" else _owned_by_root(entry))
        about = json.dumps(asdict(content), indent=2).encode()
        entry = tarfile.TarInfo("content.json")
        entry.size = len(about)
        tar.addfile(entry, io.BytesIO(about))


def _owned_by_root(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Makes root the owner of an entry, so that the archive does not depend on the user who records it."""
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


def unpack(archive: Path, folder: Path) -> DirectoryContent:
    """Unpacks a recorded directory as `folder`/data. The files belong to the user who runs this process."""
    with tarfile.open(archive) as tar:
        tar.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11 has it from 3.11.4 on
        tar.extractall(folder)
    return DirectoryContent(**json.loads((folder / "content.json").read_text()))


if __name__ == "__main__":
    record(ARCHIVES / f"entrepot-{__version__}.tar.gz")
