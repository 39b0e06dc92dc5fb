"""`python -m release`: all files of a release, from the last commit, into one folder."""

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
    """Returns 0 if everything was made, 1 if something failed. Exits with 2 on bad arguments."""
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
    if changed := changed_files(checkout):
        print(f"Left out, since they are not committed: {', '.join(changed)}")
    source = export_commit(checkout, scratch / "source")
    version = program_version(source.folder)
    if found := disagreements(source.folder):
        raise ReleaseFailed("; ".join(found))
    check_chart_version(checkout, source.folder)
    made = scratch / "made"
    _write_files(source, version, made, scratch)
    if into.exists():
        shutil.rmtree(into)
    shutil.copytree(made, into)
    for file in sorted(into.iterdir()):
        print(file)
    if with_image:
        _try_image(source, version)
    if not is_released(source.folder):
        print(f"CHANGELOG.md has no section [{version}] with a date: this is not the release {version} yet.")


def _write_files(source: SourceTree, version: str, made: Path, scratch: Path) -> None:
    for folder in (made, scratch / "unpacked", scratch / "bill"):
        folder.mkdir()
    build_packages(source, made, scratch / "unpacked")
    if pack_chart(source, made) is None:
        print("There is no Helm chart, so none is packed.")
    write_bill(source, version, made, scratch / "bill")
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in sorted(made.iterdir())]
    (made / CHECKSUMS).write_text("".join(lines))


def _try_image(source: SourceTree, version: str) -> None:
    if daemon_answers():
        print(f"docker image {build_image(source, version)}")
    else:
        print("No docker daemon answers, so the container image is not built.")


if __name__ == "__main__":
    sys.exit(main())
