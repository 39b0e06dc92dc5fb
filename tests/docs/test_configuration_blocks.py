"""Tests of the configuration files in the book. Each can be parsed, settings of the registry are valid, and files for
clients are the ones that the registry generates."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from book.markdown_blocks import Block, blocks
from book.pages import page_file, page_names
from registry.clients.client_setup import MirroredHost
from registry.clients.more_setups import PROGRAM_SETUPS
from registry.clients.registry_address import RegistryAddress
from registry.config.settings_sources import load_settings
from tests.fakes.book_page import root_files

ADDRESS = RegistryAddress("https://registry.example.com")
HOSTS = (
    MirroredHost("docker.io", "docker.io", "https://registry-1.docker.io"),
    MirroredHost("ghcr.io", "ghcr.io", "https://ghcr.io", has_short_names=False),
)
CLIENT = "client"
SETUP = "setup "
PARSERS: dict[str, Callable[[str], object]] = {
    "toml": tomllib.loads,
    "json": json.loads,
    "yaml": lambda text: [*yaml.safe_load_all(re.sub(r"\{\{.*?\}\}", "x", text))],
}


def is_for_client(block: Block) -> bool:
    """Returns whether a block is a configuration file of another program."""
    return block.mark == CLIENT or block.mark.startswith(SETUP)


def found_blocks() -> list[tuple[str, Block]]:
    """Returns the blocks of all English pages and of the documents in the root folder, each with its file and line."""
    files = [file for page in page_names() if (file := page_file(page, "en")).exists()]
    return [
        (f"{file.name}:{block.line}", block) for file in [*files, *root_files()] for block in blocks(file.read_text())
    ]


BLOCKS = found_blocks()
CONFIGURATION = [(location, block) for location, block in BLOCKS if block.language in PARSERS]
SETTINGS = [
    (location, block) for location, block in CONFIGURATION if block.language == "toml" and not is_for_client(block)
]
SETUPS = [(location, block) for location, block in CONFIGURATION if block.mark.startswith(SETUP)]


def test_the_book_has_blocks_of_each_kind() -> None:
    """The tests find many blocks of each kind. Each client of the registry's set-up page has a file in the book."""
    assert (len(CONFIGURATION) > 40, len(SETTINGS) > 20) == (True, True)
    programs_in_book = {block.mark.removeprefix(SETUP).split()[0] for _, block in SETUPS}
    assert programs_in_book == set(PROGRAM_SETUPS)


@pytest.mark.parametrize(("location", "block"), CONFIGURATION, ids=[location for location, _ in CONFIGURATION])
def test_blocks_can_be_parsed(location: str, block: Block) -> None:
    """A block of TOML, JSON or YAML is valid."""
    assert PARSERS[block.language](block.text), location


@pytest.mark.parametrize(("location", "block"), SETTINGS, ids=[location for location, _ in SETTINGS])
def test_settings_are_valid(tmp_path: Path, location: str, block: Block) -> None:
    """Each block of TOML that is not for another program has valid settings of the registry."""
    file = tmp_path / "entrepot.toml"
    file.write_text(block.text)
    assert load_settings({}, file).settings, location


def without_comments(text: str) -> str:
    """Returns a file without comments and without empty lines at its beginning and end. The book may leave these
    out."""
    return re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).strip()


@pytest.mark.parametrize(("location", "block"), SETUPS, ids=[location for location, _ in SETUPS])
def test_client_files_are_the_generated_ones(location: str, block: Block) -> None:
    """A file for a client in the book is one that the registry's set-up page shows for this client, with the address
    and the upstreams of the book."""
    program, *more = block.mark.removeprefix(SETUP).split()
    client_setup = PROGRAM_SETUPS[program](ADDRESS, HOSTS, more == ["accounts"])
    assert without_comments(block.text) in [without_comments(text) for _, text in client_setup.files], location
