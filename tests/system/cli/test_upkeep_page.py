"""The commands of docs/en/upkeep.md, moving.md and air-gapped.md do what the pages show, each beside a running
server."""

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
RUN = [section for section in SECTIONS if section.parts]
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
"""The commands that need other programs, by the tests that run those programs."""


@pytest.mark.parametrize("section", RUN, ids=lambda section: re.sub(r"\W+", "-", section.title).strip("-"))
def test_the_commands_print_what_the_page_shows(tmp_path: Path, section: Section) -> None:
    """Each with the exit code that the page shows, or 0, and with output of the same shape."""
    with ExitStack() as stack:
        place = Place(tmp_path, section, stack)
        for part in section.parts:
            if isinstance(part, Command):
                place.run(part)
            else:
                place.prepare(part)


def test_the_blocks_that_are_not_run() -> None:
    """They are those of the list, and the tests that run them exist."""
    found: dict[str, list[str]] = {}
    for section in SECTIONS:
        found |= section.elsewhere
    assert found == RUN_ELSEWHERE
    assert [file for file in found if not (ROOT / file).exists()] == []


def test_every_preparation_is_used() -> None:
    """No preparation is left over from an older page."""
    assert {part for section in SECTIONS for part in section.parts if isinstance(part, str)} == set(PREPARATIONS)


def test_the_page_has_commands() -> None:
    """The page is read as its author meant it."""
    assert len([part for section in RUN for part in section.parts if isinstance(part, Command)]) > 25
    assert not has_shape("1 tag deleted\n", ["2 tags deleted"])
    assert not has_shape("more\n1 tag deleted\n", ["1 tag deleted"])


def table() -> list[list[str]]:
    """Returns the cells of the table of commands and routes."""
    rows = PAGE.read_text().partition("\n## Commands and routes\n")[2].splitlines()
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows if row.startswith("| `")]


def test_the_routes_of_the_table_exist() -> None:
    """And the table has all routes about upkeep."""
    text = " ".join(row[1] for row in table())
    named: set[tuple[str, str]] = set()
    for methods, path in re.findall(r"`([A-Z`, ]+) (/[\w/]+)`", text):
        filled = re.sub(r"NAME|TAG|ID|DIGEST", lambda found: PLACEHOLDERS[found[0]], path)
        named |= {(method, filled) for method in re.findall(r"[A-Z]+", methods)}
    about_upkeep = re.compile(
        r"/(gc|fsck|repositories/\{name\}/tags|retention|mirror|cache|quotas|scrub|damaged|quarantine|backups|imports|jobs)\b"
    )
    assert named == {route for route in ROUTES if about_upkeep.match(route[1])}


PLACEHOLDERS = {"NAME": "{name}", "TAG": "{tag}", "ID": "{job}", "DIGEST": "{digest}"}
