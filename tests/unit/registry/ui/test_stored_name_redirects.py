"""Redirects of pages about a repository to its stored name, such as from `ubuntu` to `docker.io/library/ubuntu`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest

from tests.fakes.page_store import add_cached
from tests.unit.registry.ui.test_pages import site

STORED = "docker.io/library/ubuntu"


@pytest.fixture
async def browser(tmp_path: Path) -> AsyncIterator[httpx2.AsyncClient]:
    """A browser of a registry that has the mirrored image `ubuntu:24.04`."""
    async with site(tmp_path, accounts=False) as server:
        await add_cached(server.store, STORED, "24.04")
        async with server.browser() as client:
            yield client


@pytest.mark.parametrize(
    ("short", "stored"),
    [
        ("repositories/ubuntu", f"repositories/{STORED}"),
        ("repositories/ubuntu?sort=-version&q=24.", f"repositories/{STORED}?q=24.&sort=-version"),
        ("repositories/ubuntu?q=%C3%A4+%26+b", f"repositories/{STORED}?q=%C3%A4+%26+b"),
        ("repositories/ubuntu:24.04?platform=linux%2Farm64", f"repositories/{STORED}:24.04?platform=linux%2Farm64"),
        ("tag-history/ubuntu:24.04?after=7", f"tag-history/{STORED}:24.04?after=7"),
        ("tag-history/ubuntu?after=7", f"tag-history/{STORED}?after=7"),
        ("comparison/ubuntu", f"comparison/{STORED}"),
        ("comparison/ubuntu?tag=b&platform=x&tag=a", f"comparison/{STORED}?tag=b&tag=a&platform=x"),
    ],
)
async def test_the_redirect_keeps_the_parameters_of_the_page(
    browser: httpx2.AsyncClient, short: str, stored: str
) -> None:
    """The page of a short name redirects to that of the stored name, with the parameters that the page reads."""
    answer = await browser.get(f"/ui/{short}")
    assert (answer.status_code, answer.headers["location"]) == (303, f"/ui/{stored}")


@pytest.mark.parametrize("page", ["repositories/{}", "repositories/{}:24.04", "tag-history/{}", "comparison/{}"])
async def test_the_redirect_leaves_out_everything_else(browser: httpx2.AsyncClient, page: str) -> None:
    """A redirect leaves out parameters that the page does not read, and encodes the values of the others. So a query
    cannot add a header or lead to another site."""
    hostile = "//evil.example%0D%0ASet-Cookie:%20a=b%23"
    names = ("next", "q", "platform", "tag", "after", "https://evil.example", "%0D%0Aa:b")
    answer = await browser.get(f"/ui/{page.format('ubuntu')}?" + "&".join(f"{name}={hostile}" for name in names))
    assert answer.status_code == 303
    path, _, query = answer.headers["location"].partition("?")
    assert path == f"/ui/{page.format(STORED)}"
    parameters = [parameter.partition("=") for parameter in query.split("&")]
    assert {name for name, _, _ in parameters} <= {"q", "after", "platform", "tag"}
    assert {value for _, _, value in parameters} == {"%2F%2Fevil.example%0D%0ASet-Cookie%3A+a%3Db%23"}
    assert "set-cookie" not in answer.headers
    assert "a" not in answer.headers
