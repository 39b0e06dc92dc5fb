"""Checks that the pages about compatibility have the recorded results of the compatibility tests."""

from __future__ import annotations

import pytest

from tests.fakes.deployment.client_results import (
    CLIENTS,
    LANGUAGES,
    RESULTS,
    clients_of,
    load,
    page_file,
    with_results,
)
from tests.fakes.deployment.debian_root import RELEASES


@pytest.mark.parametrize("language", LANGUAGES)
def test_page(language: str) -> None:
    """The table of clients is the one that `make compatibility` generates from the recorded results."""
    page = page_file(language).read_text()
    assert with_results(page, language) == page


def test_every_client_was_tried() -> None:
    """The results of each Debian release have all clients that the tests run, and all their steps."""
    for name in RELEASES:
        results = load(RESULTS / f"{name}.json")
        assert {each.client: set(each.steps) for each in results} == {
            client: set(CLIENTS[client].steps) for client in clients_of(name)
        }
        assert all(each.version for each in results)
