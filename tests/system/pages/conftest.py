"""A registry with pages, and a browser."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fakes.clients.member_site import MemberSite
from tests.fakes.page_browser import PageBrowser, page_browser
from tests.fakes.page_site import page_site


@pytest.fixture(scope="package")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MemberSite]:
    """Yields one registry for all tests of the folder."""
    with page_site(tmp_path_factory.mktemp("pages")) as started:
        yield started


@pytest.fixture(scope="module")
def browser(site: MemberSite) -> Iterator[PageBrowser]:
    """Runs a browser for one module, because other tests need an event loop of their own. `site` needs an event loop to
    start, so it starts first."""
    with page_browser() as started:
        yield started
