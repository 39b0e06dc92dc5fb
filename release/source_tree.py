"""Exports the files of a commit, without the other files in the checkout."""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from release.programs import run


@dataclass(frozen=True)
class SourceTree:
    """The files of one commit, exported into `folder`."""

    folder: Path
    commit: str
    """The id of the commit."""
    committed_at: int
    """The time of the commit, in seconds since 1970. All files of the release have this time (`SOURCE_DATE_EPOCH`)."""

    @property
    def commit_time(self) -> str:
        """`committed_at` in the format of ISO 8601, in UTC."""
        return datetime.fromtimestamp(self.committed_at, UTC).isoformat()


def export_commit(checkout: Path, folder: Path) -> SourceTree:
    """Writes the files of the checkout's last commit into `folder`, which must not exist yet.

    Raises ReleaseFailed if `checkout` is not a git checkout.
    """
    commit, seconds = run("git", "log", "-1", "--format=%H %ct", cwd=checkout).decode().split()
    archive = run("git", "-c", "tar.umask=0022", "archive", "--format=tar", commit, cwd=checkout)
    folder.mkdir(parents=True)
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        _extract(tar, folder)
    return SourceTree(folder, commit, int(seconds))


def changed_files(checkout: Path) -> list[str]:
    """Returns the files of the checkout that differ from the last commit, and the files that git neither tracks nor
    ignores."""
    lines = run("git", "status", "--porcelain", cwd=checkout).decode().splitlines()
    return [line[3:] for line in lines]


def unpack(archive: Path, folder: Path) -> Path:
    """Unpacks a source distribution into the empty folder `folder`. Returns the top folder of the distribution."""
    with tarfile.open(archive) as tar:
        _extract(tar, folder)
    (unpacked,) = folder.iterdir()
    return unpacked


def _extract(tar: tarfile.TarFile, folder: Path) -> None:
    tar.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11 has it from 3.11.4 on
    tar.extractall(folder)
