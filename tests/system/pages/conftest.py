"""Fixtures for the tests of the web pages: a running registry, and a real browser."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fakes.clients.member_site import SiteWithAccounts
from tests.fakes.page_browser import PageBrowser, page_browser
from tests.fakes.page_site import page_site


@pytest.fixture(scope="package")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SiteWithAccounts]:
    """Provides one registry for all tests of this folder."""
    with page_site(tmp_path_factory.mktemp("pages")) as started:
        yield started


@pytest.fixture(scope="module")
def browser(site: SiteWithAccounts) -> Iterator[PageBrowser]:
    """Runs a browser for one test module. The browser occupies the event loop, which tests of other modules need.
    `site` also needs an event loop when it starts, so it has to start before the browser."""
    with page_browser() as started:
        yield started
