"""Tests of `release.versions`: the version is in `registry/__init__.py`, and the changelog and the chart must agree
with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from registry import __version__
from release.versions import disagreements, is_released, program_version, released_versions
from tests.fakes.server_process import ROOT

CHART = "name: entrepot\nversion: 1.7.0\nappVersion: {version}\n"


def project(folder: Path, version: str, *sections: str, chart: str = "") -> Path:
    """Writes a folder with the files that have a version: `__init__.py`, the changelog and the chart."""
    (folder / "registry").mkdir()
    (folder / "registry" / "__init__.py").write_text(f'"""Text."""\n\n__version__ = "{version}"\n')
    (folder / "CHANGELOG.md").write_text("# Changelog\n\n## [Unreleased]\n\n" + "".join(f"{s}\n\n" for s in sections))
    if chart:
        (folder / "deploy" / "helm" / "entrepot").mkdir(parents=True)
        (folder / "deploy" / "helm" / "entrepot" / "Chart.yaml").write_text(CHART.format(version=chart))
    return folder


def test_this_repository() -> None:
    """In this repository, no file contradicts the version of the program."""
    assert program_version(ROOT) == __version__
    assert disagreements(ROOT) == []


@pytest.mark.parametrize(
    ("version", "sections", "released"),
    [
        ("0.1.0", [], False),
        ("0.2.0", ["## [0.1.0] - 2026-11-01"], False),
        ("0.2.0", ["## [0.2.0] - 2026-12-01", "## [0.1.0] - 2026-11-01"], True),
    ],
)
def test_released(tmp_path: Path, version: str, sections: list[str], released: bool) -> None:
    """A version counts as released if the newest section with a date in the changelog is about this version."""
    folder = project(tmp_path, version, *sections, chart=version)
    assert is_released(folder) is released
    assert released_versions(folder) == [section.split()[1].strip("[]") for section in sections]
    assert disagreements(folder) == []


def test_a_section_of_a_newer_version(tmp_path: Path) -> None:
    """A changelog with a section about a newer version contradicts the program's version."""
    folder = project(tmp_path, "0.1.0", "## [0.2.0] - 2026-12-01", "## [0.1.0] - 2026-11-01")
    assert disagreements(folder) == ["CHANGELOG.md has a newer section than that of the program's version 0.1.0"]


def test_a_chart_of_another_version(tmp_path: Path) -> None:
    """A chart whose appVersion differs contradicts the program's version."""
    assert disagreements(project(tmp_path, "0.2.0", chart="0.1.0")) == [
        "deploy/helm/entrepot/Chart.yaml has the appVersion 0.1.0, but the program's version is 0.2.0"
    ]
