"""Tests of `entrepot export` and `entrepot import`: an exported image can be imported without a change, and a damaged
file is refused."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.client_images import (
    MIB,
    ImagePart,
    artifact,
    digest_of,
    image,
    index,
    layer,
    noise,
    write_archive,
    write_layout,
)
from tests.fakes.clients.registry_client import RegistryClient, assert_same_image, pull_all
from tests.fakes.commands import entrepot, entrepot_output, error_line, json_lines
from tests.fakes.hub.hub import hub
from tests.fakes.server_process import RegistryServer, running_server
from tests.fakes.upstream_content import UpstreamContent, index_of, noise_image

SIGNED_IMAGE = image("one", layer({"noise": noise("one", MIB)}))
TWO_PLATFORMS = index((image("on amd64"), "amd64"), (image("on arm64", architecture="arm64"), "arm64"))
SIGNATURE = artifact(SIGNED_IMAGE, "signed", "application/vnd.test.signature")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryServer]:
    """Runs a server with an image and its signature, and with an index of two platforms."""
    with running_server(tmp_path_factory.mktemp("images")) as running:
        wire = RegistryClient(running.address)
        wire.push("team/one", "v1", SIGNED_IMAGE)
        wire.push("team/one", SIGNATURE.digest, SIGNATURE)
        wire.push("team/multi", "v2", TWO_PLATFORMS)
        yield running


@pytest.fixture
def target(tmp_path: Path) -> Iterator[RegistryServer]:
    """Runs a server without content, into which images are imported."""
    with running_server(tmp_path / "target", workers=1) as running:
        yield running


def export(server: RegistryServer, *args: str | Path) -> str:
    """Runs `entrepot export` on the data directory of the server."""
    return entrepot_output("export", *args, "--data", server.data, folder=server.data.parent)


def import_(target: RegistryServer, *args: str | Path) -> list[str]:
    """Runs `entrepot import` on the data directory of the server, and returns the lines of its output."""
    return entrepot_output("import", *args, "--data", target.data, folder=target.data.parent).splitlines()


def import_error(target: RegistryServer, *args: str | Path, code: int = 1) -> str:
    """Runs an import that must fail with this exit code, and returns its error of one line."""
    return error_line(entrepot("import", *args, "--data", target.data, folder=target.data.parent), code)


@pytest.mark.parametrize("to", ["layout", "layout.tar"])
def test_export_and_import_again(server: RegistryServer, target: RegistryServer, tmp_path: Path, to: str) -> None:
    """An export has all platforms, the media types and the signature. It can be imported under the same names or under
    other names."""
    export(server, "team/one:v1", "team/multi:v2", "--to", tmp_path / to)
    lines = import_(target, tmp_path / to)
    wire = RegistryClient(target.address)
    assert_same_image(wire, "team/one", "v1", SIGNED_IMAGE)
    assert_same_image(wire, "team/multi", "v2", TWO_PLATFORMS)
    referrers = wire.ask("GET", f"/v2/team/one/referrers/{SIGNED_IMAGE.digest}").json()["manifests"]
    assert [entry["digest"] for entry in referrers] == [SIGNATURE.digest]
    assert lines[:2] == [f"team/one:v1: {SIGNED_IMAGE.digest}", f"team/multi:v2: {TWO_PLATFORMS.digest}"]
    blobs = len(SIGNED_IMAGE.blobs | TWO_PLATFORMS.blobs | SIGNATURE.blobs)
    assert lines[2].startswith(f"2 images: {blobs} blobs new")

    second_import = json.loads(import_(target, tmp_path / to, "--as", "other/name", "--json")[-1])
    assert second_import["new_blobs"] == 0
    assert_same_image(wire, "other/name", "v1", SIGNED_IMAGE)
    assert not list(tmp_path.rglob("*.partial"))


def test_names_in_a_layout(server: RegistryServer, tmp_path: Path) -> None:
    """If all images of an export are of one repository, the layout names each image by its tag. Otherwise, it names
    each image by its repository and tag. A second export into the same directory adds its images, and does not write
    existing blobs again."""
    export(server, "team/one:v1", "--to", tmp_path / "layout", "--no-referrers")
    entries = json.loads((tmp_path / "layout/index.json").read_text())["manifests"]
    (annotations,) = [entry["annotations"] for entry in entries]
    assert annotations == {"org.opencontainers.image.ref.name": "v1", "io.containerd.image.name": "team/one:v1"}
    result = json.loads(
        export(server, "team/one:v1", "team/multi:v2", "--to", tmp_path / "layout", "--json").splitlines()[-1]
    )
    assert result["present_blobs"] >= len(SIGNED_IMAGE.blobs)
    names = [
        entry["annotations"]["org.opencontainers.image.ref.name"]
        for entry in json.loads((tmp_path / "layout/index.json").read_text())["manifests"]
        if "annotations" in entry
    ]
    assert names == ["v1", "team/one:v1", "team/multi:v2"]


def test_platforms(server: RegistryServer, target: RegistryServer, tmp_path: Path) -> None:
    """With --platform, only the image of this platform is exported, without the index. A platform that the index does
    not have is an error."""
    export(server, "team/multi:v2", "--platform", "linux/arm64", "--to", tmp_path / "arm.tar")
    import_(target, tmp_path / "arm.tar", "--as", "team/arm")
    assert_same_image(RegistryClient(target.address), "team/arm", "v2", TWO_PLATFORMS.children[1])
    arguments = ("export", "team/multi:v2", "--platform", "linux/s390x", "--to", tmp_path / "none.tar")
    message = error_line(entrepot(*arguments, "--data", server.data, folder=tmp_path), 1)
    assert message == "team/multi:v2 does not exist for linux/s390x, only for linux/amd64, linux/arm64"
    message = error_line(
        entrepot(*arguments[:2], "--all-platforms", *arguments[2:], "--data", server.data, folder=tmp_path), 2
    )
    assert "contradict each other" in message
    message = error_line(entrepot("export", "team/none", "--to", "x.tar", "--data", server.data, folder=tmp_path), 1)
    assert message.startswith("team/none:latest: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["arm.tar", "target"]


def test_archives_of_docker_save(target: RegistryServer, tmp_path: Path) -> None:
    """An archive of `docker save` in its old format has no manifests, so the import makes them. They are the same at
    each import. The archive may be compressed, and its layers may be symbolic links to other files of the archive."""
    old = write_archive(tmp_path / "old.tar", SIGNED_IMAGE, "localhost:5000/team/old:v1")
    lines = import_(target, old)
    wire = RegistryClient(target.address)
    pull_all(wire, "team/old", "v1")
    document = wire.manifest("team/old", "v1").json()
    assert SIGNED_IMAGE.config is not None
    assert document["config"]["digest"] == SIGNED_IMAGE.config.digest
    assert [each["digest"] for each in document["layers"]] == [digest_of(each.tar) for each in SIGNED_IMAGE.layers]
    (tmp_path / "old.tar.gz").write_bytes(gzip.compress(old.read_bytes()))
    assert import_(target, tmp_path / "old.tar.gz", "--as", "team/again:v9")[0].split()[1] == lines[0].split()[1]

    with tarfile.open(tmp_path / "linked.tar", "w") as linked, tarfile.open(old) as source:
        for member in source:
            data = source.extractfile(member)
            if member.name == document["layers"][0]["digest"].partition(":")[2] + "/layer.tar":
                link = tarfile.TarInfo(member.name)
                linked.addfile(_rename_member(member, "real/layer.tar"), data)
                link.type, link.linkname = tarfile.SYMTYPE, "../real/layer.tar"
                linked.addfile(link)
            else:
                linked.addfile(member, data)
    assert import_(target, tmp_path / "linked.tar")[0] == lines[0]


def _rename_member(member: tarfile.TarInfo, name: str) -> tarfile.TarInfo:
    """Gives the member of an archive another name."""
    member.name = name
    return member


def test_import_of_an_incomplete_index(target: RegistryServer, tmp_path: Path) -> None:
    """Newer versions of docker save a complete index, but only the blobs of one platform. The import stores an index
    with this platform alone, and reports the missing platform."""
    layout = write_layout(tmp_path / "layout", {"v1": TWO_PLATFORMS})
    assert TWO_PLATFORMS.children[1].config is not None
    (layout / "blobs/sha256" / TWO_PLATFORMS.children[1].config.digest.partition(":")[2]).unlink()
    completed = entrepot("import", layout, "--as", "team/part", "--data", target.data, folder=tmp_path)
    assert (completed.returncode, "the file lacks 1 platform of the image" in completed.stderr) == (0, True)
    wire = RegistryClient(target.address)
    stored = wire.manifest("team/part", "v1").json()
    assert [entry["digest"] for entry in stored["manifests"]] == [TWO_PLATFORMS.children[0].digest]
    pull_all(wire, "team/part", "v1")


@pytest.mark.parametrize(
    ("name_in_file", "imported_name"),
    [
        ("localhost:5000/team/names:v1", "team/names:v1"),
        ("registry.example.com/team/names:v2", "team/names:v2"),
        ("docker.io/library/names:v3", "names:v3"),
        ("docker.io/team/names:v4", "team/names:v4"),
        ("other.example.com/team/names:v5", "other.example.com/team/names:v5"),
    ],
)
def test_import_removes_hosts_from_names(tmp_path: Path, name_in_file: str, imported_name: str) -> None:
    """The import removes the host from the name of an image if it is the registry's own host, the host of Docker Hub,
    or a host with a port. Any other host stays a part of the name."""
    write_archive(tmp_path / "x.tar", image("names"), name_in_file)
    message = entrepot_output("import", "x.tar", folder=tmp_path, ENTREPOT_PUBLIC_URL="https://registry.example.com")
    assert message.startswith(f"{imported_name}: sha256:")


def _damage(layout: Path, part: ImagePart) -> None:
    """Changes the last byte of the file of this part."""
    path = layout / "blobs/sha256" / part.digest.partition(":")[2]
    path.write_bytes(path.read_bytes()[:-1] + b"?")


def test_damaged_files(target: RegistryServer, tmp_path: Path) -> None:
    """Damaged and incomplete files are refused with one line that names the digest, and no tag is set."""
    wire = RegistryClient(target.address)
    for number, part in enumerate((SIGNED_IMAGE.layers[-1], SIGNED_IMAGE.manifest)):
        layout = write_layout(tmp_path / f"layout{number}", {"v1": SIGNED_IMAGE})
        _damage(layout, part)
        message = import_error(target, layout, "--as", "team/bad")
        assert f"{part.digest} is damaged" in message
    other = image("another")
    layout = write_layout(tmp_path / "incomplete", {"v1": other})
    (layout / "blobs/sha256" / other.layers[1].digest.partition(":")[2]).unlink()
    assert f"is incomplete: it has no blob {other.layers[1].digest}" in import_error(target, layout, "--as", "team/bad")
    assert wire.tags("team/bad") == []

    archive = write_archive(tmp_path / "archive.tar", SIGNED_IMAGE, "team/bad:v1")
    (tmp_path / "cut.tar").write_bytes(archive.read_bytes()[: MIB // 2])
    assert "cut.tar" in import_error(target, tmp_path / "cut.tar")
    body = bytearray(archive.read_bytes())
    position = body.index(noise("one", 1000))
    body[position] ^= 1
    (tmp_path / "damaged.tar").write_bytes(body)
    assert "is damaged: its bytes have the digest sha256:" in import_error(target, tmp_path / "damaged.tar")
    (tmp_path / "text").write_text("no archive")
    assert "is no tar archive" in import_error(target, tmp_path / "text")
    (tmp_path / "empty").mkdir()
    assert "is neither an OCI image layout nor an archive of docker save" in import_error(target, tmp_path / "empty")
    assert "there is no file or directory" in import_error(target, tmp_path / "nothing")


def test_unclear_names(target: RegistryServer, tmp_path: Path) -> None:
    """If a file does not state the name of its images, the import fails, and the error says to give a name with
    --as."""
    layout = write_layout(tmp_path / "two", {"v1": SIGNED_IMAGE, "v2": TWO_PLATFORMS})
    assert "states only the tag v1 for an image; give --as NAME" in import_error(target, layout)
    assert "has 2 images (:v1, :v2); give --as NAME without a tag" in import_error(target, layout, "--as", "team/x:y")
    assert "--as: " in import_error(target, layout, "--as", "Team", code=2)
    document = json.loads((layout / "index.json").read_text())
    del document["manifests"][0]["annotations"], document["manifests"][1]
    (layout / "index.json").write_text(json.dumps(document))
    assert "states no name for the image" in import_error(target, layout)
    import_(target, layout, "--as", "team/latest")
    assert_same_image(RegistryClient(target.address), "team/latest", "latest", SIGNED_IMAGE)


def test_failed_export_leaves_no_file(server: RegistryServer, tmp_path: Path) -> None:
    """An export that finds a damaged blob in the store fails, and leaves no file."""
    damaged = image("victim", layer({"noise": noise("victim", MIB)}))
    RegistryClient(server.address).push("team/victim", "v1", damaged)
    digest = damaged.layers[-1].digest.partition(":")[2]
    file = server.data / f"blobs/sha256/{digest[:2]}/{digest}"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    for to in ("x.tar", "layout"):
        message = error_line(
            entrepot("export", "team/victim:v1", "--to", to, "--data", server.data, folder=tmp_path), 1
        )
        assert f"bytes of sha256:{digest} are damaged" in message
    assert not (tmp_path / "x.tar").exists()
    assert not (tmp_path / "layout/index.json").exists()
    assert not list(tmp_path.rglob("*.partial"))


def test_export_of_a_mirrored_image(tmp_path: Path) -> None:
    """An export of a mirrored image fetches the blobs that are not cached from the upstream. The file can be imported
    into a repository that is not mirrored."""
    content = UpstreamContent()
    amd64, arm64 = noise_image("amd64", 1000, 2 * MIB), noise_image("arm64", 2000, architecture="arm64")
    content.add("library/app", index_of((amd64, "amd64"), (arm64, "arm64")), "1")
    with hub(tmp_path, content) as running:
        (tmp_path / "entrepot.toml").write_text(
            f'[[upstream]]\nname = "docker.io"\ndefault = true\nendpoints = ["{running.url}"]\n'
        )
        options = ("--config", "entrepot.toml", "--data", "data")
        entrepot_output("mirror", "warm", "app:1", "--platform", "linux/arm64", *options, folder=tmp_path)
        entrepot_output("export", "app:1", "--to", "app.tar", *options, folder=tmp_path)
        message = error_line(entrepot("import", "app.tar", "--as", "docker.io/library/x", *options, folder=tmp_path), 1)
        assert "is mirrored from docker.io and takes no pushes" in message
        entrepot_output("import", "app.tar", "--as", "team/app", *options, folder=tmp_path)
    with running_server(tmp_path) as server:
        # Three manifests, a config and a layer of each platform, and the second layer of amd64.
        assert len(pull_all(RegistryClient(server.address), "team/app", "1")) == 3 + 2 * 2 + 1


def test_docker_archives_have_only_container_images(server: RegistryServer, tmp_path: Path) -> None:
    """An artifact cannot be exported with the format docker-archive, because docker could not load it. A docker-archive
    of an image has the files that old and new versions of docker read."""
    arguments = ("--format", "docker-archive", "--data", server.data)
    error = error_line(
        entrepot("export", f"team/one@{SIGNATURE.digest}", "--to", "a.tar", *arguments, folder=tmp_path), 1
    )
    assert "is no container image of one platform" in error
    entrepot_output("export", "team/one:v1", "--to", "one.tar", *arguments, folder=tmp_path)
    with tarfile.open(tmp_path / "one.tar") as archive:
        names = archive.getnames()
        (listed,) = json.load(archive.extractfile("manifest.json") or io.BytesIO())
    assert {"oci-layout", "index.json", "manifest.json", listed["Config"], *listed["Layers"]} <= set(names)
    assert listed["RepoTags"] == ["team/one:v1"]


def test_import_does_not_change_an_immutable_tag(server: RegistryServer, tmp_path: Path) -> None:
    """If an import would change an immutable tag, it reports the same error as a push, and does not import this image
    and its referrers. The other images of the file are imported."""
    (tmp_path / "entrepot.toml").write_text('[[immutable]]\nrepositories = "team/**"\ntags = "v1"\n')
    options = ("--config", "entrepot.toml", "--data", "data")
    export(server, "team/one:v1", "team/multi:v2", "--to", tmp_path / "both")
    changed = write_layout(tmp_path / "changed", {"v1": TWO_PLATFORMS})
    entrepot_output("import", changed, "--as", "team/one", *options, folder=tmp_path)
    completed = entrepot("import", "both", "--json", *options, folder=tmp_path)
    assert completed.returncode == 1
    problem, stored, result = json_lines(completed.stdout)
    assert (problem["event"], problem["image"]) == ("problem", "team/one:v1")
    assert problem["reason"] == f"team/one:v1 is immutable and points at {TWO_PLATFORMS.digest}; push another tag"
    assert (stored["event"], stored["image"]) == ("image", "team/multi:v2")
    assert (result["images"], result["problems"]) == (1, 1)
    message = entrepot("import", "both", *options, folder=tmp_path).stderr
    assert message == f"problem: team/one:v1: {problem['reason']}\n"
    same_image = entrepot("import", changed, "--as", "team/one", *options, folder=tmp_path)
    assert (same_image.returncode, same_image.stderr) == (0, "")


def test_json_lines(server: RegistryServer, target: RegistryServer, tmp_path: Path) -> None:
    """With --json, both commands print one JSON line for each image, and one at the end."""
    lines = json_lines(export(server, "team/one:v1", "--to", tmp_path / "x", "--json"))
    assert [line["event"] for line in lines] == ["image", "done"]
    lines = json_lines("\n".join(import_(target, tmp_path / "x", "--json")))
    assert [line["event"] for line in lines] == ["image", "referrer", "done"]
