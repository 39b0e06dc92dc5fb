"""Builds the source distribution, the wheel and the archive of the Helm chart. The same commit always gives the same
bytes."""

from __future__ import annotations

import fnmatch
import gzip
import io
import os
import sys
import tarfile
from pathlib import Path

from release.programs import run
from release.source_tree import SourceTree, unpack
from release.versions import CHART, chart_field


def build_packages(source: SourceTree, into: Path, scratch: Path) -> None:
    """Writes the source distribution and the wheel into the folder `into`. The wheel is built from the unpacked source
    distribution.

    `scratch`: an empty folder for temporary files. Raises ReleaseFailed if one of the two cannot be built.
    """
    _build(source, source.folder, "sdist", into)
    (archive,) = into.glob("*.tar.gz")
    _build(source, unpack(archive, scratch), "wheel", into)


def _build(source: SourceTree, folder: Path, target: str, into: Path) -> None:
    env = {**os.environ, "SOURCE_DATE_EPOCH": str(source.committed_at)}
    run(sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", into, cwd=folder, env=env)


def pack_chart(source: SourceTree, into: Path) -> Path | None:
    """Packs the Helm chart as `helm package` does. All files in the archive have the time of the commit, and root as
    their owner.

    Returns the archive, or None if there is no chart.
    """
    chart = source.folder / CHART
    if not chart.exists():
        return None
    archive = into / f"entrepot-chart-{chart_field(source.folder, 'version')}.tgz"
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for file in _chart_files(chart):
            entry = tarfile.TarInfo(f"entrepot/{file.relative_to(chart).as_posix()}")
            body = file.read_bytes()
            entry.size, entry.mode, entry.mtime = len(body), 0o644, source.committed_at
            tar.addfile(entry, io.BytesIO(body))
    archive.write_bytes(gzip.compress(packed.getvalue(), mtime=source.committed_at))
    return archive


def _chart_files(chart: Path) -> list[Path]:
    """Returns the files of the chart in the order of their names, without those that match a pattern in `.helmignore`.
    Does not support patterns with a `!`, or with a `/` in the middle."""
    ignore = chart / ".helmignore"
    lines = ignore.read_text().splitlines() if ignore.exists() else []
    patterns = [line.strip().strip("/") for line in lines if line.strip() and not line.startswith("#")]
    files = [path for path in sorted(chart.rglob("*")) if path.is_file() and path != ignore]
    return [
        file
        for file in files
        if not any(fnmatch.fnmatch(part, pattern) for part in file.relative_to(chart).parts for pattern in patterns)
    ]
