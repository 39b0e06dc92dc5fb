"""Makes the bill of materials (SBOM) of a release: the list of the packages that an installation has, as CycloneDX
JSON."""

from __future__ import annotations

import json
import sys
import uuid
from pathlib import Path
from typing import Any

from release.programs import run
from release.source_tree import SourceTree


def write_bill(source: SourceTree, version: str, into: Path, scratch: Path) -> Path:
    """Installs the pinned dependencies into a new environment below the folder `scratch`. Writes the bill of materials
    of this environment into the folder `into`, with the licenses and the dependencies of each package.

    The serial number and the time depend only on the commit, so the same commit gives the same bytes with the same
    Python. Raises ReleaseFailed if a package cannot be installed.
    """
    environment = scratch / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=scratch)
    python, pins = environment / "bin" / "python", source.folder / "requirements" / "runtime.txt"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "--python", python)
    run(*pip, "install", "--require-hashes", "--requirement", pins, cwd=scratch)
    raw = scratch / "bill.json"
    program = Path(sys.executable).with_name("cyclonedx-py")
    options = ("--output-reproducible", "--spec-version", "1.6", "--output-format", "JSON", "--output-file", raw)
    project = ("--pyproject", source.folder / "pyproject.toml", "--mc-type", "application")
    run(program, "environment", *project, *options, python, cwd=scratch)
    bill: dict[str, Any] = json.loads(raw.read_text())
    bill["serialNumber"] = uuid.uuid5(uuid.NAMESPACE_URL, f"pkg:pypi/entrepot@{version}#{source.commit}").urn
    bill["metadata"]["timestamp"] = source.commit_time
    bill["metadata"]["component"] |= {"version": version, "purl": f"pkg:pypi/entrepot@{version}"}
    written = into / f"entrepot-{version}.cdx.json"
    written.write_text(json.dumps(bill, indent=2, ensure_ascii=False) + "\n")
    return written
