"""Fixtures and helpers for the tests of the upstream client, with which a mirror requests content from its upstream
registries: a real `registry`, which stores tokens and locks for the client, and a fake Docker Hub with one image."""

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

BAD_REPO = RepositoryName("library/bad")
"""A repository whose requests fail."""
ABSENT_DIGEST = "sha256:" + "0" * 64


def good_repo(number: int = 0) -> RepositoryName:
    """Returns a repository whose requests succeed, in contrast to BAD_REPO."""
    return RepositoryName(f"library/good{number}")


def repository(head: str) -> str:
    """Returns the repository, without `library/`, that a request names in its path or in the scope of a token."""
    match = re.search(r"library(?:/|%2F)(\w+)", head.split()[1])
    return match[1] if match else ""


def target(head: str) -> str:
    """Returns the path of a request."""
    return head.split()[1].partition("?")[0]


@pytest.fixture
async def registry(tmp_path: Path) -> AsyncIterator[StoredRegistry]:
    async with opened_registry(tmp_path / "data") as opened:
        yield opened


@pytest.fixture(scope="session")
def image() -> ImageTree:
    """The image at the upstream. It has three blobs: a config, a layer of 1000 bytes, and a layer of 3 MiB and 11
    bytes."""
    return noise_image("app", 1000, 3 * MIB + 11)


@pytest.fixture
def content(image: ImageTree) -> UpstreamContent:
    upstream_content = UpstreamContent()
    upstream_content.add(REPO, image, "1", "latest")
    return upstream_content


@pytest.fixture
def upstream(tmp_path: Path, content: UpstreamContent) -> Iterator[Hub]:
    with hub(tmp_path, content) as running:
        yield running
