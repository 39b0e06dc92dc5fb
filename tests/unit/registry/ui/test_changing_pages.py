"""The pages on which people change a repository: they delete and restore tags, and write the description."""

from __future__ import annotations

import html
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
import pytest

from storage.access import AuditQuery
from storage.names import RepositoryName, Tag
from storage.store.stored_registry import StoredRegistry
from tests.fakes.page_store import add_cached
from tests.fakes.registry_content import BY, all_tags, push_image
from tests.fakes.store_accounts import add_grant
from tests.unit.registry.ui.test_pages import FROM_PAGE, Site, site

APP = RepositoryName("team/app")
REMOVAL = f"/ui/tag-removal/{APP}"
RESTORATION = f"/ui/tag-restoration/{APP}"
HISTORY = f"/ui/tag-history/{APP}"
DESCRIPTION = f"/ui/description/{APP}"
PAGE = f"/ui/repositories/{APP}"


async def post(browser: httpx2.AsyncClient, path: str, **fields: str | list[str]) -> httpx2.Response:
    headers = {**FROM_PAGE, "content-type": "application/x-www-form-urlencoded"}  # browsers send it with no field, too
    return await browser.post(path, data=fields, headers=headers)


def hidden(page: str, name: str = "tag") -> list[str]:
    """Returns the values of the hidden fields of a page."""
    return [html.unescape(value) for value in re.findall(rf'<input type="hidden" name="{name}" value="([^"]*)"', page)]


@asynccontextmanager
async def logged_in(here: Site, name: str | None, actions: str = "") -> AsyncIterator[httpx2.AsyncClient]:
    """Returns a browser of this account, which gets these actions on team/**. `None`: of an anonymous visitor."""
    if actions:
        await add_grant(here.app.accounts, f"user:{name}", "team/**", actions)
    async with here.browser() as browser:
        if name is not None:
            assert (await here.log_in(browser, name)).status_code == 303
        yield browser


async def digest_of_tag(store: StoredRegistry, tag: str) -> str:
    return (await store.resolve_manifest(APP, Tag(tag))).digest


async def test_tags_are_deleted_after_a_preview_and_come_back(tmp_path: Path) -> None:
    """The preview changes nothing and says what would be deleted and what stays. A tag that has moved since stays. The
    undo restores the others, except one that exists again."""
    async with site(tmp_path, immutable=[{"repositories": ["team/**"], "tags": ["v*"]}]) as here:
        only = await push_image(here.store, APP, "only", "old1", "old2")
        await push_image(here.store, APP, "shared", "old3", "v1")
        await push_image(here.store, APP, "moves", "moving")
        async with logged_in(here, "alice", "pull,push,delete") as browser:
            listed = (await browser.get(PAGE)).text
            assert 'name="tag" value="old1"' in listed
            assert f'formaction="{REMOVAL}"' in listed
            chosen = {"tag": ["old1", "old2", "old3", "moving", "v1", "none"]}
            preview = await browser.get(REMOVAL, params=chosen)
            assert preview.status_code == 200
            assert {text.partition("@")[0] for text in hidden(preview.text)} == {"old1", "old2", "old3", "moving"}
            assert only.digest in preview.text
            assert "<li>v1</li>" in preview.text
            assert "<li>none</li>" in preview.text
            assert len(await all_tags(here.store, APP)) == 5

            moved = await push_image(here.store, APP, "moved", "moving")
            done = await post(browser, REMOVAL, tag=hidden(preview.text))
            assert done.status_code == 200
            assert f"points at {moved.digest} now" in done.text
            assert await all_tags(here.store, APP) == ["moving", "v1"]
            assert {text.partition("@")[0] for text in hidden(done.text)} == {"old1", "old2", "old3"}
            assert "This can be undone at least until <time" in done.text

            await push_image(here.store, APP, "again", "old3")
            undone = await post(browser, RESTORATION, tag=hidden(done.text))
            assert undone.status_code == 200
            assert "These tags could not be restored" in undone.text
            assert await all_tags(here.store, APP) == ["moving", "old1", "old2", "old3", "v1"]
            assert await digest_of_tag(here.store, "old2") == only.digest


@pytest.mark.parametrize(
    ("actions", "deletes", "pushes"),
    [("pull", False, False), ("pull,push", False, True), ("pull,delete", True, False), (None, False, False)],
)
async def test_each_visitor_is_offered_what_they_may_do(
    tmp_path: Path, actions: str | None, deletes: bool, pushes: bool
) -> None:
    """Buttons are shown to those who have the right, and a forged form of another visitor changes nothing. `None`: an
    anonymous visitor, who may only pull."""
    async with site(tmp_path) as here:
        kept = await push_image(here.store, APP, "kept", "v1", "v2")
        await push_image(here.store, APP, "newer", "v2")
        await add_grant(here.app.accounts, "everyone", str(APP), "pull")
        async with logged_in(here, None if actions is None else "alice", actions or "") as browser:
            listed, shown = (await browser.get(PAGE)).text, (await browser.get(f"{PAGE}:v2")).text
            assert (f'formaction="{REMOVAL}"' in listed, f"{REMOVAL}?tag=v2" in shown) == (deletes, deletes)
            assert (f'href="{DESCRIPTION}"' in listed) == pushes
            history = (await browser.get(f"{HISTORY}:v2")).text
            assert (kept.digest in hidden(history, "digest")) == pushes
            for path, may, fields in (
                (REMOVAL, deletes, {"tag": f"v1@{kept.digest}"}),
                (RESTORATION, pushes, {"tag": f"v1@{kept.digest}"}),
                (f"{HISTORY}:v2", pushes, {"digest": kept.digest}),
                (DESCRIPTION, pushes, {"text": "mine", "revision": "0", "action": "save"}),
            ):
                if path in (REMOVAL, DESCRIPTION):
                    form = await browser.get(path)
                    assert form.status_code == (200 if may else 303 if actions is None else 403), path
                answer = await post(browser, path, **fields)
                if may:
                    assert answer.status_code in (200, 303), path
                elif actions is None:
                    assert answer.headers["location"].startswith("/ui/login?next="), path
                else:
                    assert answer.status_code == 403, path
            assert (len(await all_tags(here.store, APP)) == 2) == (not deletes)
            assert (await digest_of_tag(here.store, "v2") == kept.digest) == pushes
            assert (await here.store.descriptions.description(APP) is not None) == pushes


async def test_forms_of_other_sites_and_wrong_forms_change_nothing(tmp_path: Path) -> None:
    """Forms of other sites change nothing, not even through an admin's browser. Mirrored repositories cannot be
    changed, and those that a visitor may not see are not found."""
    async with site(tmp_path) as here:
        image = await push_image(here.store, APP, "one", "v1")
        await add_cached(here.store, "docker.io/library/ubuntu", "1")
        entry = f"v1@{image.digest}"
        async with logged_in(here, "root") as browser:
            for path, fields in (
                (REMOVAL, {"tag": entry}),
                (DESCRIPTION, {"text": "x", "revision": "0", "action": "save"}),
            ):
                foreign = await browser.post(path, data=fields, headers={"sec-fetch-site": "cross-site"})
                assert foreign.status_code == 403
            for status, path, wrong in (
                (400, REMOVAL, {}),
                (400, REMOVAL, {"tag": [entry.replace("v1", f"v{n}") for n in range(201)]}),
                (400, REMOVAL, {"tag": "v1"}),
                (400, RESTORATION, {"tag": "-@x"}),
                (413, REMOVAL, {"tag": "x" * 100_000}),
                (400, DESCRIPTION, {"text": "x", "action": "save"}),
                (400, DESCRIPTION, {"text": "x" * 300_000, "revision": "0", "action": "save"}),
                (400, DESCRIPTION, {"text": "x" * 300_000, "revision": "0", "action": "preview"}),
                (413, DESCRIPTION, {"text": "é" * 150_000, "revision": "0", "action": "save"}),
                (405, "/ui/tag-removal/docker.io/library/ubuntu", {"tag": entry}),
                (405, "/ui/tag-history/docker.io/library/ubuntu:1", {"digest": image.digest}),
                (404, "/ui/tag-removal/no/such", {"tag": entry}),
                (404, HISTORY, {"digest": image.digest}),
            ):
                assert (await post(browser, path, **wrong)).status_code == status, (path, status)
            mirrored = await browser.get("/ui/tag-history/docker.io/library/ubuntu:1")
            assert mirrored.status_code == 200
            assert hidden(mirrored.text, "digest") == []
            assert (await browser.get(f"{REMOVAL}:v1")).status_code == 404
            assert (await browser.get(f"{REMOVAL}?" + "&".join(f"tag=v{n}" for n in range(201)))).status_code == 400
            nothing = await browser.get(REMOVAL)  # as after a login that a form had needed
            assert "No tag was chosen." in nothing.text
            assert (await browser.get(RESTORATION)).headers["location"] == HISTORY
        async with logged_in(here, "alice") as browser:
            for path in (HISTORY, f"{HISTORY}:v1", REMOVAL, DESCRIPTION):
                assert (await browser.get(path)).status_code == 404, path
        assert await all_tags(here.store, APP) == ["v1"]
        assert await here.store.descriptions.description(APP) is None


async def test_denied_forms_are_in_the_audit_log(tmp_path: Path) -> None:
    """With who sent them, from where, and the path, as denied requests to the API are. What is allowed is not."""
    async with site(tmp_path) as here:
        await push_image(here.store, APP, "only", "old1")
        async with logged_in(here, "alice", "pull") as browser:
            assert (await browser.get(PAGE)).status_code == 200
            digest = await digest_of_tag(here.store, "old1")
            for path in (REMOVAL, RESTORATION, "/ui/mirror/purge", "/ui/upkeep/start"):
                answer = await post(browser, path, tag=f"old1@{digest}", reference="ubuntu", kind="gc")
                assert answer.status_code == 403, path
        assert await denied_requests(here) == {
            ("alice", "page", path, "192.0.2.1")
            for path in (REMOVAL, RESTORATION, "/ui/mirror/purge", "/ui/upkeep/start")
        }


async def denied_requests(here: Site) -> set[tuple[str, str, str, str]]:
    """Returns the account, the action, the target and the address of all denied requests in the audit log."""
    await here.app.audit_buffer.aclose()
    denied = here.app.accounts.audit(AuditQuery(outcome="denied"), 100).items
    return {(entry.actor, entry.action, entry.target, entry.address) for entry in denied}


async def test_a_tag_gets_back_what_it_pointed_at(tmp_path: Path) -> None:
    """The history lists each change and restores an earlier digest, also of a deleted tag. An immutable tag stays, and
    the page says why."""
    async with site(tmp_path, immutable=[{"repositories": ["team/**"], "tags": ["fixed*"]}]) as here:
        first = await push_image(here.store, APP, "first", "v1", "fixed")
        second = await push_image(here.store, APP, "second", "v1")
        async with logged_in(here, "alice", "pull,push,delete") as browser:
            page = (await browser.get(f"{HISTORY}:v1")).text
            assert hidden(page, "digest") == [first.digest]
            answer = await post(browser, f"{HISTORY}:v1", digest=first.digest)
            assert (answer.status_code, answer.headers["location"]) == (303, f"{HISTORY}:v1")
            assert await digest_of_tag(here.store, "v1") == first.digest

            await post(browser, REMOVAL, tag=f"v1@{first.digest}")
            page = (await browser.get(f"{HISTORY}:v1")).text
            assert "The tag was deleted." in page
            assert (await post(browser, f"{HISTORY}:v1")).status_code == 303
            assert await digest_of_tag(here.store, "v1") == first.digest

            refused = await post(browser, f"{HISTORY}:fixed", digest=second.digest)
            assert refused.status_code == 403
            assert "The tag was not restored." in refused.text
            assert "immutable" in re.findall(r'<p class="message" lang="en">(.*)</p>', refused.text)[0]
            assert hidden((await browser.get(f"{HISTORY}:fixed")).text, "digest") == []
            assert await digest_of_tag(here.store, "fixed") == first.digest

            changes = re.findall(rf'<td data-label="Tag"><a href="{HISTORY}:(\w+)"', (await browser.get(HISTORY)).text)
            assert (changes[:4], sorted(changes[4:])) == (["v1"] * 4, ["fixed", "v1"])
            assert (await browser.get(f"{HISTORY}:never")).status_code == 404
            assert (await browser.get(f"{HISTORY}@{first.digest}")).status_code == 404
        assert await denied_requests(here) == {("alice", "page", f"{HISTORY}:fixed", "192.0.2.1")}


async def test_a_long_history_has_pages(tmp_path: Path) -> None:
    """Later pages still show what the tag points at now."""
    async with site(tmp_path, accounts=False) as here:
        images = [await push_image(here.store, APP, f"{n}") for n in range(2)]
        for n in range(60):
            await here.store.put_manifest(APP, images[n % 2], [Tag("v1")], by=BY)
        async with here.browser() as browser:
            first = (await browser.get(f"{HISTORY}:v1")).text
            more = re.search(r'<a class="button" href="([^"]+after=[^"]+)"', first)
            assert more is not None
            second = (await browser.get(html.unescape(more[1]))).text
            assert [page.count('<th scope="row">') for page in (first, second)] == [50, 10]
            for page in (first, second):
                assert set(hidden(page, "digest")) == {images[0].digest}


async def test_a_description_is_written(tmp_path: Path) -> None:
    """A preview saves nothing. Markup is shown as text. Two writers do not overwrite each other unknowingly."""
    text = "\n# Title\n\n<script>alert(1)</script> [x](javascript:alert(1)) ![p](https://evil.example/p.png)\n"
    async with site(tmp_path) as here:
        await push_image(here.store, APP, "one", "v1")
        async with logged_in(here, "alice", "pull,push") as browser:
            preview = await post(browser, DESCRIPTION, text=text, revision="0", action="preview")
            assert preview.status_code == 200
            shown = preview.text.partition('<h2 id="preview">')[2]
            assert "<h3>Title</h3>" in shown
            for page in (preview.text, shown):
                assert "<script>alert" not in page
                assert 'href="javascript:' not in page
                assert "<img" not in page.partition("<main")[2]
            area = re.search(r"<textarea[^>]*>\n(.*?)</textarea>", preview.text, re.DOTALL)
            assert area is not None
            assert html.unescape(area[1]) == text
            assert await here.store.descriptions.description(APP) is None

            saved = await post(browser, DESCRIPTION, text=text.replace("\n", "\r\n"), revision="0", action="save")
            assert (saved.status_code, saved.headers["location"]) == (303, PAGE)
            stored = await here.store.descriptions.description(APP)
            assert stored is not None
            assert (stored.text, stored.actor) == (text, "alice")

            late = await post(browser, DESCRIPTION, text="mine", revision="0", action="save")
            assert late.status_code == 412
            assert "mine</textarea>" in late.text
            assert "<h3>Title</h3>" in late.text
            again = await post(
                browser, DESCRIPTION, text="mine", revision=hidden(late.text, "revision")[0], action="save"
            )
            assert again.status_code == 303
            assert "<p>mine</p>" in (await browser.get(PAGE)).text
            revision = hidden((await browser.get(DESCRIPTION)).text, "revision")[0]
            assert (await post(browser, DESCRIPTION, text="", revision=revision, action="save")).status_code == 303
            assert 'class="description"' not in (await browser.get(PAGE)).text
