"""Tests of `release.versions`: the version is in `registry/__init__.py`, and the changelog and the chart must agree
with it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from registry import __version__
from release.errors import ReleaseFailed
from release.versions import check_chart_version, disagreements, is_released, program_version, released_versions
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


@pytest.mark.parametrize(
    ("chart_version", "template", "problem"),
    [
        ("1.7.0", "port: 5000", None),
        ("1.7.1", "port: 5001", None),
        (
            "1.7.0",
            "port: 5001",
            "deploy/helm/entrepot has changed since v0.1.0: give Chart.yaml a version other than 1.7.0",
        ),
    ],
)
def test_a_changed_chart_needs_a_new_version(
    tmp_path: Path, chart_version: str, template: str, problem: str | None
) -> None:
    """`make release` refuses a chart that differs from the chart of the release before, unless its version differs as
    well."""
    checkout = project(tmp_path, "0.1.0", "## [0.1.0] - 2026-11-01", chart="0.1.0")
    chart = checkout / "deploy" / "helm" / "entrepot"
    (chart / "values.yaml").write_text("port: 5000")
    commit(checkout, "v0.1.0")
    (checkout / "registry" / "__init__.py").write_text('__version__ = "0.2.0"\n')
    (checkout / "CHANGELOG.md").write_text("## [0.2.0] - 2026-12-01\n\n## [0.1.0] - 2026-11-01\n")
    (chart / "values.yaml").write_text(template)
    (chart / "Chart.yaml").write_text((chart / "Chart.yaml").read_text().replace("1.7.0", chart_version))
    commit(checkout, "v0.2.0")
    if problem is None:
        check_chart_version(checkout, checkout)
    else:
        with pytest.raises(ReleaseFailed) as refused:
            check_chart_version(checkout, checkout)
        assert str(refused.value) == problem


def commit(checkout: Path, tag: str) -> None:
    """Commits all files in `checkout`, and tags the commit."""
    identity = ("-c", "user.name=Tester", "-c", "user.email=tester@example.com", "-c", "commit.gpgsign=false")
    for command in (("init", "--quiet"), ("add", "--all"), (*identity, "commit", "--quiet", "-m", tag), ("tag", tag)):
        subprocess.run(["git", *command], cwd=checkout, check=True)
