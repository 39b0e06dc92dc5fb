"""Tests of the files that `make release` makes."""

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
    """Returns the names of the files in the last commit."""
    return set(run_in(ROOT, "git", "ls-tree", "-r", "--name-only", "HEAD").splitlines())


def test_a_second_release_has_the_same_bytes(released: ReleaseFiles, tmp_path: Path) -> None:
    """A second release from the same commit has the same bytes, even if it is made in another folder, with another time
    zone and other permissions."""
    checkout = tmp_path / "another" / "checkout"
    run_in(tmp_path, "git", "clone", "--quiet", ROOT, checkout)
    (checkout / "dist").mkdir()
    (checkout / "dist" / "of-the-last-release.whl").touch()
    env = {"TZ": "Pacific/Auckland", "LC_ALL": "C", "PYTHONHASHSEED": "7"}
    output = run_in(checkout, sys.executable, "-m", "release", "--no-image", env=env, umask=0o077)
    assert "Left out" not in output
    assert ReleaseFiles(checkout / "dist").bytes_by_name() == released.bytes_by_name()


def test_wheel_has_the_whole_program(released: ReleaseFiles, tracked: set[str]) -> None:
    """The wheel has all files of the two packages, including templates, catalogues and the markers for type checkers.
    Its only other files are metadata, with the license and the README."""
    with zipfile.ZipFile(released.wheel) as wheel:
        names, metadata = set(wheel.namelist()), f"entrepot-{__version__}.dist-info"
        metadata_fields = email.message_from_bytes(wheel.read(f"{metadata}/METADATA"))
        licence = wheel.read(f"{metadata}/licenses/LICENSE")
    assert names - {name for name in names if name.startswith(metadata)} == {
        name for name in tracked if name.startswith(("registry/", "storage/"))
    }
    assert {"registry/py.typed", "storage/py.typed", "registry/ui/locale/zh_Hans.po"} <= names
    assert licence == (ROOT / "LICENSE").read_bytes()
    assert (metadata_fields["Name"], metadata_fields["Version"], metadata_fields["License-Expression"]) == (
        "entrepot",
        __version__,
        "Apache-2.0",
    )
    assert metadata_fields.get_payload().startswith("# Entrepot")  # type: ignore[union-attr]


def test_source_distribution_is_complete(released: ReleaseFiles, tracked: set[str]) -> None:
    """The source distribution has all files of the commit, so that `make serve` and `make test` work in it."""
    top = f"entrepot-{__version__}/"
    with tarfile.open(released.source) as archive:
        names = {name.removeprefix(top) for name in archive.getnames()}
    assert tracked - names == set()
    assert names - tracked == {"PKG-INFO"}


def test_checksums(released: ReleaseFiles) -> None:
    """`sha256sum --check` accepts SHA256SUMS, which names all other files of the release."""
    listed = {line.split()[1] for line in (released.folder / "SHA256SUMS").read_text().splitlines()}
    assert listed == set(released.bytes_by_name()) - {"SHA256SUMS"}
    run_in(released.folder, "sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS")


def test_bill_of_materials(released: ReleaseFiles) -> None:
    """The bill of materials is valid CycloneDX. It lists pinned dependencies with their versions and licenses, and the
    packages on which the program depends directly."""
    bill = json.loads(released.bill.read_text())
    program = "import sys; from cyclonedx.schema import SchemaVersion; from cyclonedx.validation.json import *;"
    program += "sys.exit(repr(JsonStrictValidator(SchemaVersion.V1_6).validate_str(sys.stdin.read())))"
    # `validate_str` returns None for a valid document. sys.exit prints its argument to stderr.
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
    (direct_dependencies,) = [each["dependsOn"] for each in bill["dependencies"] if each["ref"] == top["bom-ref"]]
    assert any(ref.startswith("fastapi") for ref in direct_dependencies)


def test_changes_that_are_not_committed_are_left_out(released: ReleaseFiles, tmp_path: Path) -> None:
    """A release has only the files of the last commit. Changes and new files in the folder are listed, and left out."""
    checkout = tmp_path / "checkout"
    run_in(tmp_path, "git", "clone", "--quiet", ROOT, checkout)
    (checkout / "registry" / "stray.py").write_text("raise SystemExit\n")
    version = checkout / "registry" / "__init__.py"
    version.write_text(version.read_text().replace(__version__, "9.9.9"))
    program = "from pathlib import Path; from release.source_tree import *;"
    program += "print(changed_files(Path())); export_commit(Path(), Path('made'))"
    output = run_in(checkout, sys.executable, "-c", program)
    assert "registry/stray.py" in output
    assert not (checkout / "made" / "registry" / "stray.py").exists()
    assert "9.9.9" not in (checkout / "made" / "registry" / "__init__.py").read_text()
