"""Finds the page to which a visitor returns after a login, if they sent a form without being logged in."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlsplit

from registry.admin.browser_login import local_path
from registry.request import RequestInvalid


def page_with_form(referer: str, pages: Sequence[str]) -> str:
    """Returns the path and query of the page on which the visitor has sent a form. `pages`: the paths of the pages that
    have the form. `referer`: the value of the header `Referer`, in which browsers send the URL of the page. If it names
    none of these pages, returns the first of them."""
    try:
        url = urlsplit(referer)
        page = local_path(f"{url.path}?{url.query}" if url.query else url.path, pages[0])
    except (ValueError, RequestInvalid):  # the value is no URL, or the login page would not accept its path
        return pages[0]
    return page if url.path in pages else pages[0]
