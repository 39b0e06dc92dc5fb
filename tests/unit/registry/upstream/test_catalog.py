"""Tests of the list of repositories of an upstream."""

from __future__ import annotations

from typing import cast

import pytest

from registry.upstream.catalog import CatalogPage, CatalogReader
from registry.upstream.requester import UpstreamRequester
from registry.upstream.upstream_responses import DocumentParser, UpstreamResponse


async def test_no_page_follows_the_last_one() -> None:
    """A call for the page after the last one raises an error. It sends no request for the first page."""
    reader = CatalogReader(cast("UpstreamRequester", None), cast("DocumentParser", None))
    last = CatalogPage(["team/app"], None, cast("UpstreamResponse", None))
    with pytest.raises(ValueError, match="the previous page is the last one"):
        await reader.page(last)
