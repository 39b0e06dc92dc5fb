"""What must not be in the repository's files."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from tests.fakes.server_process import ROOT

MADE = {"data", "build", "dist", "__pycache__"}
# Put together here, so that this file does not hold what it looks for.
PLACES = re.compile("|".join(("/" + "root/", "/" + r"work/\w", "/" + r"home/(?!you\b|bob\b)\w", "file:" + "//")))
INDEX = re.compile(
    "|".join((r"--(extra-)?index" + "-url", "--find" + "-links", r"pypi\." + r"\w+", "python" + "hosted"))
)


def files() -> list[Path]:
    """The tracked files, or, where this is no checkout, all but what is made."""
    if shutil.which("git"):
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if listed.returncode == 0:
            return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    return [path for path in ROOT.rglob("*") if path.is_file() and not _is_made(path.relative_to(ROOT))]


def _is_made(path: Path) -> bool:
    """Whether a tool made it, or git keeps its own there."""
    folders = path.parts[:-1]
    return any(name in MADE or (name.startswith(".") and name != ".ci") for name in folders)


def hits(pattern: re.Pattern[str]) -> list[str]:
    found = []
    for path in files():
        text = path.read_text(encoding="utf-8", errors="replace")
        for number, line in enumerate(text.splitlines(), 1):
            if pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}")
    return found


def test_no_path_of_a_machine() -> None:
    """No file names a folder of the machine it was written on."""
    assert hits(PLACES) == []


def test_no_package_index() -> None:
    """No file names a package index, the lock files least of all: pip asks the one it is set up for."""
    assert [hit for hit in hits(INDEX) if "--no-emit" not in hit] == []


def test_locked_dependencies_have_hashes() -> None:
    """Every pinned dependency has at least one hash, so pip takes nothing else."""
    for file in (ROOT / "requirements").glob("*.txt"):
        text = re.sub(r"^#.*\n", "", file.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
        pins = text.splitlines()
        assert pins
        assert all(re.match(r"[\w-]+==\S+ .*--hash=sha256:[0-9a-f]{64}", pin) for pin in pins)
