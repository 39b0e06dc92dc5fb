"""`python -m release` makes all files of a release from the last commit and writes them into one folder."""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from release.bill_of_materials import write_bill
from release.container_image import build_image, daemon_answers
from release.errors import ReleaseFailed
from release.packages import build_packages, pack_chart
from release.source_tree import SourceTree, changed_files, export_commit
from release.versions import check_chart_version, disagreements, is_released, program_version

CHECKSUMS = "SHA256SUMS"


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes a release. Returns the exit status: 0 if all files were made, 1 after a failure. Exits with 2 on bad
    arguments."""
    parser = argparse.ArgumentParser(prog="python -m release", description="Makes the files of a release.")
    parser.add_argument("--into", type=Path, default=Path("dist"), help="the folder, which is emptied first")
    parser.add_argument("--no-image", action="store_true", help="do not build the container image")
    parsed = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory(prefix="entrepot-release-") as scratch:
            _make_release(Path.cwd(), parsed.into.absolute(), Path(scratch), with_image=not parsed.no_image)
    except ReleaseFailed as error:
        print(f"release: {error}", file=sys.stderr)
        return 1
    return 0


def _make_release(checkout: Path, into: Path, scratch: Path, *, with_image: bool) -> None:
    """Makes the files of the release from the checked-out commit. They replace the folder `into`. Raises
    ReleaseFailed."""
    if changed := changed_files(checkout):
        print(f"Left out, since they are not committed: {', '.join(changed)}")
    source = export_commit(checkout, scratch / "source")
    version = program_version(source.folder)
    if found := disagreements(source.folder):
        raise ReleaseFailed("; ".join(found))
    check_chart_version(checkout, source.folder)
    release_folder = scratch / "made"
    _write_files(source, version, release_folder, scratch)
    if into.exists():
        shutil.rmtree(into)
    shutil.copytree(release_folder, into)
    for file in sorted(into.iterdir()):
        print(file)
    if with_image:
        _try_image(source, version)
    if not is_released(source.folder):
        print(f"CHANGELOG.md has no section [{version}] with a date: this is not the release {version} yet.")


def _write_files(source: SourceTree, version: str, release_folder: Path, scratch: Path) -> None:
    """Writes the packages, the Helm chart, the bill of materials and the checksums into `release_folder`."""
    for folder in (release_folder, scratch / "unpacked", scratch / "bill"):
        folder.mkdir()
    build_packages(source, release_folder, scratch / "unpacked")
    if pack_chart(source, release_folder) is None:
        print("There is no Helm chart, so none is packed.")
    write_bill(source, version, release_folder, scratch / "bill")
    lines = [
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in sorted(release_folder.iterdir())
    ]
    (release_folder / CHECKSUMS).write_text("".join(lines))


def _try_image(source: SourceTree, version: str) -> None:
    if daemon_answers():
        print(f"docker image {build_image(source, version)}")
    else:
        print("No docker daemon answers, so the container image is not built.")


if __name__ == "__main__":
    sys.exit(main())
