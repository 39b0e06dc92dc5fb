"""Checks that docs/en/compatibility.md has the recorded results of the compatibility tests."""

from __future__ import annotations

from tests.fakes.deployment.client_results import CLIENTS, PAGE, RESULTS, clients_of, load, page
from tests.fakes.deployment.debian_root import RELEASES


def test_page() -> None:
    """The page is the one that `make compatibility` generates from the recorded results."""
    assert PAGE.read_text() == page()


def test_every_client_was_tried() -> None:
    """The results of each Debian release have all clients that the tests run, and all their steps."""
    for name in RELEASES:
        results = load(RESULTS / f"{name}.json")
        assert {each.client: set(each.steps) for each in results} == {
            client: set(CLIENTS[client].steps) for client in clients_of(name)
        }
        assert all(each.version for each in results)
