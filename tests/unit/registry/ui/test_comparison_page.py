"""The page that compares two images, and the link that downloads an image."""

from __future__ import annotations

import html
import io
import re
import tarfile
from pathlib import Path

import pytest

from storage.names import RepositoryName
from tests.fakes.page_store import add_cached, add_described, add_image
from tests.fakes.store_accounts import add_grant
from tests.unit.registry.ui.test_pages import Site, site

APP = RepositoryName("team/app")
COMPARISON = f"/ui/comparison/{APP}"
HOSTILE = "<script>alert(1)</script>"


def rows_below(page: str, heading: str) -> list[str]:
    """Returns the rows of the table below the heading with this id."""
    part = page.partition(f'id="{heading}"')[2].partition("</section>")[0]
    rows = part.partition("<tbody>")[2].split("</tr>")[:-1]
    return [html.unescape(" ".join(re.sub(r"<[^>]+>", " ", row).split())) for row in rows]


async def test_two_tags_are_compared(tmp_path: Path) -> None:
    """The page shows the shared layers, the layers of only one image, and the differences of the configs. HTML in a
    config is shown as text."""
    async with site(tmp_path, accounts=False) as server:
        await add_image(
            server.store, APP, "v1", [b"shared", b"old"], User="1", Env=["A=1", "B=2"], Labels={"x": HOSTILE}
        )
        await add_image(server.store, APP, "v2", [b"shared", b"new 1", b"new 2"], Env=["A=2", "B=2"], Cmd=["run", "it"])
        async with server.browser() as browser:
            answer = await browser.get(COMPARISON, params={"tag": ["v1", "v2"]})
            assert answer.status_code == 200
            page = answer.text
            counts = [len(rows_below(page, f"{kind}-layers")) for kind in ("base", "other", "shared")]
            assert counts == [1, 2, 1]
            changes = rows_below(page, "changes")
            assert "User 1 empty" in changes
            assert "Command missing run it" in changes
            assert "Environment A 1 2" in changes
            assert f"Labels x {HOSTILE} missing" in changes
            assert len(changes) == 4
            assert HOSTILE not in page
            same = (await browser.get(COMPARISON, params={"tag": ["v1", "v1"]})).text
            assert "Both are the same image." in same
            for query, status in (
                ("", 200),
                ("?tag=v1", 200),
                ("?tag=v1&tag=none", 404),
                ("?tag=v1&tag=-", 400),
                ("?tag=v1&tag=sha256:1", 400),
                ("?tag=v1&tag=v2&tag=v3", 400),
            ):
                answer = await browser.get(COMPARISON + query)
                assert answer.status_code == status, query
                assert ('<input id="tag-1"' in answer.text) == (query.count("tag") < 3)
            assert (await browser.get("/ui/comparison/no/such")).status_code == 404
            assert (await browser.get(f"{COMPARISON}:v1")).status_code == 404


async def test_a_hidden_repository_is_not_compared(tmp_path: Path) -> None:
    """A repository that the visitor may not pull looks like a missing one. A short name of a mirrored repository is
    redirected to the stored name."""
    async with site(tmp_path) as server:
        await add_image(server.store, APP, "v1", [b"layer"])
        await add_cached(server.store, "docker.io/library/ubuntu", "1")
        await add_grant(server.app.accounts, "user:alice", "docker.io/**", "pull")
        async with server.browser() as browser:
            await server.log_in(browser, "alice")
            for name in (APP, "no/such"):
                answer = await browser.get(f"/ui/comparison/{name}?tag=v1&tag=v1")
                assert answer.status_code == 404
                assert "<textarea" not in answer.text
            answer = await browser.get("/ui/comparison/ubuntu?tag=1&tag=1")
            assert answer.headers["location"] == "/ui/comparison/docker.io/library/ubuntu?tag=1&tag=1"


async def download_links(server: Site, name: str | None) -> list[str]:
    """Returns the links to archives on the page of a tag. `name` is None for an anonymous visitor."""
    async with server.browser() as browser:
        if name is not None:
            await server.log_in(browser, name)
        page = (await browser.get("/ui/repositories/team/app:v1")).text
        return [html.unescape(link) for link in re.findall(r'href="([^"]+/archive[^"]*)" download', page)]


@pytest.mark.parametrize(
    ("allow", "has_link"), [("nobody", (False, False)), ("accounts", (False, True)), ("everyone", (True, True))]
)
@pytest.mark.slow
async def test_download_links_follow_the_setting(tmp_path: Path, allow: str, has_link: tuple[bool, bool]) -> None:
    """A visitor sees a download link only if the setting allows it."""
    async with site(tmp_path, downloads={"allow": allow}) as server:
        await add_described(server.store, str(APP), "v1", "text")
        await add_grant(server.app.accounts, "everyone", str(APP), "pull")
        links = [await download_links(server, name) for name in (None, "alice")]
        assert tuple(map(bool, links)) == has_link
        if links[1]:
            async with server.browser() as browser:
                await server.log_in(browser, "alice")
                archive = await browser.get(links[1][0])
                assert archive.status_code == 200
                with tarfile.open(fileobj=io.BytesIO(archive.content)) as opened:
                    assert "manifest.json" in opened.getnames()
