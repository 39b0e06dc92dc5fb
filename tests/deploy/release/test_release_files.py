"""What `make release` makes."""

from __future__ import annotations

import email
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from registry import __version__
from tests.fakes.deployment.release_files import ReleaseFiles, run_in
from tests.fakes.server_process import ROOT


@pytest.fixture(scope="module")
def tracked() -> set[str]:
    """The files of the last commit."""
    return set(run_in(ROOT, "git", "ls-tree", "-r", "--name-only", "HEAD").splitlines())


def test_a_second_release_has_the_same_bytes(released: ReleaseFiles, tmp_path: Path) -> None:
    """Made again in another folder, with another time zone and other permissions, each file is the same."""
    checkout = tmp_path / "another" / "checkout"
    run_in(tmp_path, "git", "clone", "--quiet", ROOT, checkout)
    (checkout / "dist").mkdir()
    (checkout / "dist" / "of-the-last-release.whl").touch()
    env = {"TZ": "Pacific/Auckland", "LC_ALL": "C", "PYTHONHASHSEED": "7"}
    said = run_in(checkout, sys.executable, "-m", "release", "--no-image", env=env, umask=0o077)
    assert "Left out" not in said
    assert ReleaseFiles(checkout / "dist").bytes_by_name() == released.bytes_by_name()


def test_wheel_has_the_whole_program(released: ReleaseFiles, tracked: set[str]) -> None:
    """The wheel has every file of the two packages, such as templates, catalogues and the markers for type checkers,
    and besides them only metadata with the license and the README."""
    with zipfile.ZipFile(released.wheel) as wheel:
        names, metadata = set(wheel.namelist()), f"entrepot-{__version__}.dist-info"
        about = email.message_from_bytes(wheel.read(f"{metadata}/METADATA"))
        licence = wheel.read(f"{metadata}/licenses/LICENSE")
    assert names - {name for name in names if name.startswith(metadata)} == {
        name for name in tracked if name.startswith(("registry/", "storage/"))
    }
    assert {"registry/py.typed", "storage/py.typed", "registry/ui/locale/zh_Hans.po"} <= names
    assert licence == (ROOT / "LICENSE").read_bytes()
    assert (about["Name"], about["Version"], about["License-Expression"]) == ("entrepot", __version__, "Apache-2.0")
    assert about.get_payload().startswith("# Entrepot")  # type: ignore[union-attr]


def test_source_distribution_is_complete(released: ReleaseFiles, tracked: set[str]) -> None:
    """The source distribution has every file of the commit, so that `make serve` and `make test` work in it."""
    top = f"entrepot-{__version__}/"
    with tarfile.open(released.source) as archive:
        names = {name.removeprefix(top) for name in archive.getnames()}
    assert tracked - names == set()
    assert names - tracked == {"PKG-INFO"}


def test_checksums(released: ReleaseFiles) -> None:
    """SHA256SUMS is what `sha256sum --check` takes, and names every other file."""
    listed = {line.split()[1] for line in (released.folder / "SHA256SUMS").read_text().splitlines()}
    assert listed == set(released.bytes_by_name()) - {"SHA256SUMS"}
    run_in(released.folder, "sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS")


def test_bill_of_materials(released: ReleaseFiles) -> None:
    """The bill of materials is valid CycloneDX; it lists exactly the pinned dependencies that are installed on this
    machine, with versions and licenses, and which packages the program itself needs."""
    bill = json.loads(released.bill.read_text())
    program = "import sys; from cyclonedx.schema import SchemaVersion; from cyclonedx.validation.json import *;"
    program += "sys.exit(repr(JsonStrictValidator(SchemaVersion.V1_6).validate_str(sys.stdin.read())))"
    checked = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], input=released.bill.read_bytes(), capture_output=True
    )
    assert checked.stderr.decode().strip() == "None"
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "requirements" / "runtime.txt").read_text(), re.MULTILINE))
    listed = {each["name"].lower().replace("_", "-"): each["version"] for each in bill["components"]}
    assert listed.items() <= {name.lower().replace("_", "-"): version for name, version in pins.items()}.items()
    assert {"fastapi", "apsw", "uvicorn", "starlette"} <= listed.keys()
    assert all(each.get("licenses") for each in bill["components"])
    top = bill["metadata"]["component"]
    assert (top["name"], top["version"], top["type"]) == ("entrepot", __version__, "application")
    (needs,) = [each["dependsOn"] for each in bill["dependencies"] if each["ref"] == top["bom-ref"]]
    assert any(ref.startswith("fastapi") for ref in needs)


def test_changes_that_are_not_committed_are_left_out(released: ReleaseFiles, tmp_path: Path) -> None:
    """A release is made of the last commit: it names what the folder has beside that, and leaves it out. A chart of
    another version is refused."""
    checkout = tmp_path / "checkout"
    run_in(tmp_path, "git", "clone", "--quiet", ROOT, checkout)
    (checkout / "registry" / "stray.py").write_text("raise SystemExit\n")
    version = checkout / "registry" / "__init__.py"
    version.write_text(version.read_text().replace(__version__, "9.9.9"))
    program = "from pathlib import Path; from release.source_tree import *;"
    program += "print(changed_files(Path())); export_commit(Path(), Path('made'))"
    said = run_in(checkout, sys.executable, "-c", program)
    assert "registry/stray.py" in said
    assert not (checkout / "made" / "registry" / "stray.py").exists()
    assert "9.9.9" not in (checkout / "made" / "registry" / "__init__.py").read_text()
