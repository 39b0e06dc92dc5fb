"""The records and leases of a real registry, a fake Hub with one image, and names of repositories."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from storage.names import RepositoryName
from storage.store.stored_registry import StoredRegistry
from tests.fakes.client_images import MIB
from tests.fakes.hub.hub import Hub, hub
from tests.fakes.small_store import small_store as small_store
from tests.fakes.upstream_content import ImageTree, UpstreamContent, noise_image
from tests.fakes.upstream_source import REPO, opened_registry

BAD = RepositoryName("library/bad")
NONE = "sha256:" + "0" * 64


def good(number: int = 0) -> RepositoryName:
    """Returns a repository whose requests succeed, in contrast to BAD."""
    return RepositoryName(f"library/good{number}")


def repository(head: str) -> str:
    """Returns the repository of a request, also of a request for a token."""
    found = re.search(r"library(?:/|%2F)(\w+)", head.split()[1])
    return found[1] if found else ""


def target(head: str) -> str:
    """Returns the path of a request."""
    return head.split()[1].partition("?")[0]


@pytest.fixture
async def registry(tmp_path: Path) -> AsyncIterator[StoredRegistry]:
    async with opened_registry(tmp_path / "data") as made:
        yield made


@pytest.fixture(scope="session")
def held() -> ImageTree:
    """Returns an image of three blobs: a config, 1000 bytes, and a little more than 3 MiB."""
    return noise_image("app", 1000, 3 * MIB + 11)


@pytest.fixture
def content(held: ImageTree) -> UpstreamContent:
    made = UpstreamContent()
    made.add(REPO, held, "1", "latest")
    return made


@pytest.fixture
def upstream(tmp_path: Path, content: UpstreamContent) -> Iterator[Hub]:
    with hub(tmp_path, content) as running:
        yield running
