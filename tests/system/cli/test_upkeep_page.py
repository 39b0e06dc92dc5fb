"""Tests that the commands on the pages docs/en/upkeep.md, moving.md and air-gapped.md print what the pages show, while
a server runs."""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.fakes.page_sections import Command, Section, has_shape, read_sections
from tests.fakes.server_process import ROOT
from tests.system.admin.test_api_refusals import ROUTES
from tests.system.cli.upkeep_page_place import PREPARATIONS, Place

PAGE = ROOT / "docs" / "en" / "upkeep.md"
SECTIONS = [section for name in ("upkeep", "moving", "air-gapped") for section in read_sections(PAGE.with_stem(name))]
SECTIONS_TO_RUN = [section for section in SECTIONS if section.parts]
RUN_ELSEWHERE = {
    "tests/deploy": [
        "pip download --dest entrepot-wheels entrepot",
        "pip install --no-index entrepot-wheels/*.whl",
    ],
    "tests/system/clients/test_image_files.py": [
        "docker load --input app.tar",
        "skopeo copy --all oci:images:1 docker://registry.example.com/team/app:1",
        "docker save team/app:1 | gzip > app.tar.gz && entrepot import app.tar.gz",
    ],
}
"""The commands of the pages that are not run here, by the tests that run them. They need other programs."""


@pytest.mark.parametrize("section", SECTIONS_TO_RUN, ids=lambda section: re.sub(r"\W+", "-", section.title).strip("-"))
def test_the_commands_print_what_the_page_shows(tmp_path: Path, section: Section) -> None:
    """Each command has the exit code that the page shows, or 0, and an output of the same shape. Numbers may differ."""
    with ExitStack() as stack:
        place = Place(tmp_path, section, stack)
        for part in section.parts:
            if isinstance(part, Command):
                place.run(part)
            else:
                place.prepare(part)


def test_commands_that_are_not_run_here_are_run_elsewhere() -> None:
    """The commands that the pages mark as not run here are those of `RUN_ELSEWHERE`, and the tests that run them
    exist."""
    found: dict[str, list[str]] = {}
    for section in SECTIONS:
        found |= section.elsewhere
    assert found == RUN_ELSEWHERE
    assert [file for file in found if not (ROOT / file).exists()] == []


def test_every_preparation_is_used() -> None:
    """Every preparation in `PREPARATIONS` is used by a page."""
    assert {part for section in SECTIONS for part in section.parts if isinstance(part, str)} == set(PREPARATIONS)


def test_pages_have_many_commands() -> None:
    """The pages have more than 25 commands that are run here. The comparison of outputs notices a different number and
    an additional line."""
    assert len([part for section in SECTIONS_TO_RUN for part in section.parts if isinstance(part, Command)]) > 25
    assert not has_shape("1 tag deleted\n", ["2 tags deleted"])
    assert not has_shape("more\n1 tag deleted\n", ["1 tag deleted"])


def table() -> list[list[str]]:
    """Returns the cells of the table of commands and API routes on the page upkeep.md."""
    rows = PAGE.read_text().partition("\n## Commands and routes\n")[2].splitlines()
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows if row.startswith("| `")]


def test_table_has_all_routes_about_upkeep() -> None:
    """The table of routes on the page has all routes of the API about upkeep, and no others."""
    text = " ".join(row[1] for row in table())
    routes_on_page: set[tuple[str, str]] = set()
    for methods, path in re.findall(r"`([A-Z`, ]+) (/[\w/]+)`", text):
        filled = re.sub(r"NAME|TAG|ID|DIGEST", lambda found: PLACEHOLDERS[found[0]], path)
        routes_on_page |= {(method, filled) for method in re.findall(r"[A-Z]+", methods)}
    about_upkeep = re.compile(
        r"/(gc|fsck|repositories/\{name\}/tags|retention|mirror|cache|quotas|scrub|damaged|quarantine|backups|imports|jobs)\b"
    )
    assert routes_on_page == {route for route in ROUTES if about_upkeep.match(route[1])}


PLACEHOLDERS = {"NAME": "{name}", "TAG": "{tag}", "ID": "{job}", "DIGEST": "{digest}"}
