"""Reads the version of the program from `registry/__init__.py`, and checks that CHANGELOG.md and the Helm chart agree
with it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from release.errors import ReleaseFailed
from release.programs import run

CHART = Path("deploy", "helm", "entrepot")
_VERSION = re.compile(r'^__version__ = "([^"]+)"$', re.MULTILINE)
_SECTION = re.compile(r"^## \[(\d[^]]*)\] - \d{4}-\d\d-\d\d$", re.MULTILINE)


def program_version(source: Path) -> str:
    """Returns the version of the program. Raises ReleaseFailed if `registry/__init__.py` does not have it."""
    found = _VERSION.search((source / "registry" / "__init__.py").read_text())
    if found is None:
        raise ReleaseFailed('registry/__init__.py has no line __version__ = "…"')
    return found[1]


def released_versions(source: Path) -> list[str]:
    """Returns the versions that have a section with a date in CHANGELOG.md, the newest first."""
    return _SECTION.findall((source / "CHANGELOG.md").read_text())


def is_released(source: Path) -> bool:
    """Returns whether the program's version has been released: the newest section with a date in the changelog is about
    this version. Before a release, the changes are in the section `Unreleased`."""
    return released_versions(source)[:1] == [program_version(source)]


def disagreements(source: Path) -> list[str]:
    """Returns a sentence for each file that contradicts the program's version."""
    version, found = program_version(source), []
    if version in released_versions(source)[1:]:
        found.append(f"CHANGELOG.md has a newer section than that of the program's version {version}")
    chart = source / CHART / "Chart.yaml"
    if chart.exists() and (named := chart_field(source, "appVersion")) != version:
        found.append(f"{CHART}/Chart.yaml has the appVersion {named}, but the program's version is {version}")
    return found


def chart_field(source: Path, name: str) -> str:
    """Returns a field of the Helm chart, such as `version`, the version of the chart itself."""
    chart: dict[str, Any] = yaml.safe_load((source / CHART / "Chart.yaml").read_text())
    return str(chart.get(name))


def check_chart_version(checkout: Path, source: Path) -> None:
    """Raises ReleaseFailed if the chart differs from the one of the release before, but has the same `version`. Helm
    repositories and clients keep one archive per version, so they would go on installing the older chart.

    `checkout`: the git checkout, in which the tag `v0.1.0` marks the commit of release 0.1.0. A release without a tag
    is not compared. `source`: the exported files of the new release.
    """
    older = [version for version in released_versions(source) if version != program_version(source)]
    if not older or not run("git", "tag", "--list", tag := f"v{older[0]}", cwd=checkout):
        return
    if not run("git", "diff", "--name-only", tag, "HEAD", "--", CHART, cwd=checkout):
        return
    released_chart = yaml.safe_load(run("git", "show", f"{tag}:{CHART}/Chart.yaml", cwd=checkout))
    if str(released_chart["version"]) == chart_field(source, "version"):
        raise ReleaseFailed(
            f"{CHART} has changed since {tag}: give Chart.yaml a version other than {released_chart['version']}"
        )
