"""The pages on which people change a repository: they delete and restore tags, and write its description."""

from __future__ import annotations

import asyncio
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
    # Browsers send this Content-Type even if the form has no field.
    headers = {**FROM_PAGE, "content-type": "application/x-www-form-urlencoded"}
    return await browser.post(path, data=fields, headers=headers)


def hidden_fields(page: str, name: str = "tag") -> list[str]:
    """Returns the values of the hidden fields of a page."""
    return [html.unescape(value) for value in re.findall(rf'<input type="hidden" name="{name}" value="([^"]*)"', page)]


@asynccontextmanager
async def logged_in(server: Site, name: str | None, actions: str = "") -> AsyncIterator[httpx2.AsyncClient]:
    """Yields a browser in which this account is logged in, after it got these actions on team/**. If `name` is None,
    the visitor is anonymous."""
    if actions:
        await add_grant(server.app.accounts, f"user:{name}", "team/**", actions)
    async with server.browser() as browser:
        if name is not None:
            assert (await server.log_in(browser, name)).status_code == 303
        yield browser


async def digest_of_tag(store: StoredRegistry, tag: str) -> str:
    return (await store.resolve_manifest(APP, Tag(tag))).digest


async def test_tags_are_deleted_after_a_preview_and_restored(tmp_path: Path) -> None:
    """The preview changes nothing, and says what would be deleted and what stays. A tag that has moved since the
    preview stays. The undo restores the deleted tags, except one that was pushed again."""
    async with site(tmp_path, immutable=[{"repositories": ["team/**"], "tags": ["v*"]}]) as server:
        only_image = await push_image(server.store, APP, "only", "old1", "old2")
        await push_image(server.store, APP, "shared", "old3", "v1")
        await push_image(server.store, APP, "moves", "moving")
        async with logged_in(server, "alice", "pull,push,delete") as browser:
            listed = (await browser.get(PAGE)).text
            assert 'name="tag" value="old1"' in listed
            assert f'formaction="{REMOVAL}"' in listed
            chosen = {"tag": ["old1", "old2", "old3", "moving", "v1", "none"]}
            preview = await browser.get(REMOVAL, params=chosen)
            assert preview.status_code == 200
            assert {text.partition("@")[0] for text in hidden_fields(preview.text)} == {
                "old1",
                "old2",
                "old3",
                "moving",
            }
            assert only_image.digest in preview.text
            assert "<li>v1</li>" in preview.text
            assert "<li>none</li>" in preview.text
            assert len(await all_tags(server.store, APP)) == 5

            moved = await push_image(server.store, APP, "moved", "moving")
            deleted = await post(browser, REMOVAL, tag=hidden_fields(preview.text))
            assert deleted.status_code == 200
            assert f"points at {moved.digest} now" in deleted.text
            assert await all_tags(server.store, APP) == ["moving", "v1"]
            assert {text.partition("@")[0] for text in hidden_fields(deleted.text)} == {"old1", "old2", "old3"}
            assert "This can be undone at least until <time" in deleted.text

            await push_image(server.store, APP, "again", "old3")
            restored = await post(browser, RESTORATION, tag=hidden_fields(deleted.text))
            assert restored.status_code == 200
            assert "These tags could not be restored" in restored.text
            assert await all_tags(server.store, APP) == ["moving", "old1", "old2", "old3", "v1"]
            assert await digest_of_tag(server.store, "old2") == only_image.digest


@pytest.mark.parametrize(
    ("actions", "may_delete", "may_push"),
    [("pull", False, False), ("pull,push", False, True), ("pull,delete", True, False), (None, False, False)],
)
async def test_buttons_are_shown_to_visitors_with_the_right(
    tmp_path: Path, actions: str | None, may_delete: bool, may_push: bool
) -> None:
    """A visitor sees a button only with the right to the action. A forged form of a visitor without the right changes
    nothing. If `actions` is None, the visitor is anonymous and may only pull."""
    async with site(tmp_path) as server:
        first_image = await push_image(server.store, APP, "kept", "v1", "v2")
        await push_image(server.store, APP, "newer", "v2")
        await add_grant(server.app.accounts, "everyone", str(APP), "pull")
        async with logged_in(server, None if actions is None else "alice", actions or "") as browser:
            listed, tag_page = (await browser.get(PAGE)).text, (await browser.get(f"{PAGE}:v2")).text
            assert (f'formaction="{REMOVAL}"' in listed, f"{REMOVAL}?tag=v2" in tag_page) == (may_delete, may_delete)
            assert (f'href="{DESCRIPTION}"' in listed) == may_push
            history = (await browser.get(f"{HISTORY}:v2")).text
            assert (first_image.digest in hidden_fields(history, "digest")) == may_push
            for path, allowed, fields in (
                (REMOVAL, may_delete, {"tag": f"v1@{first_image.digest}"}),
                (RESTORATION, may_push, {"tag": f"v1@{first_image.digest}"}),
                (f"{HISTORY}:v2", may_push, {"digest": first_image.digest}),
                (DESCRIPTION, may_push, {"text": "mine", "revision": "0", "action": "save"}),
            ):
                if path in (REMOVAL, DESCRIPTION):
                    form = await browser.get(path)
                    assert form.status_code == (200 if allowed else 303 if actions is None else 403), path
                answer = await post(browser, path, **fields)
                if allowed:
                    assert answer.status_code in (200, 303), path
                elif actions is None:
                    assert answer.headers["location"].startswith("/ui/login?next="), path
                else:
                    assert answer.status_code == 403, path
            assert (len(await all_tags(server.store, APP)) == 2) == (not may_delete)
            assert (await digest_of_tag(server.store, "v2") == first_image.digest) == may_push
            assert (await server.store.descriptions.find_description(APP) is not None) == may_push


@pytest.mark.slow
async def test_a_visitor_who_may_not_pull_changes_nothing(tmp_path: Path) -> None:
    """A visitor who may push and delete, but not pull, gets 404 for each form that changes a repository, with the text
    for a repository that does not exist. The page has no digest."""
    async with site(tmp_path) as server:
        await push_image(server.store, APP, "one", "v1")
        deleted = (await push_image(server.store, APP, "two", "deleted")).digest
        await server.store.delete_tag(APP, Tag("deleted"), by=BY)
        async with logged_in(server, "alice", "push,delete") as browser:
            for name in (str(APP), "team/none"):
                for path, fields in (
                    (f"/ui/tag-history/{name}:deleted", {"digest": deleted}),
                    (f"/ui/tag-history/{name}:deleted", {}),
                    (f"/ui/tag-restoration/{name}", {"tag": f"deleted@{deleted}"}),
                    (f"/ui/tag-removal/{name}", {"tag": f"v1@{deleted}"}),
                    (f"/ui/description/{name}", {"text": "x", "revision": "0", "action": "save"}),
                ):
                    answer = await post(browser, path, **fields)
                    assert (answer.status_code, "sha256" in answer.text) == (404, False), (path, answer.text)
                    assert f"there is no repository {name}" in answer.text
        assert await all_tags(server.store, APP) == ["v1"]


async def test_foreign_and_invalid_forms_change_nothing(tmp_path: Path) -> None:
    """Forms of other sites change nothing, even through an admin's browser. Invalid forms change nothing either.
    Mirrored repositories cannot be changed. A repository that the visitor may not see gets 404."""
    async with site(tmp_path) as server:
        image = await push_image(server.store, APP, "one", "v1")
        await add_cached(server.store, "docker.io/library/ubuntu", "1")
        entry = f"v1@{image.digest}"
        async with logged_in(server, "root") as browser:
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
            assert hidden_fields(mirrored.text, "digest") == []
            assert (await browser.get(f"{REMOVAL}:v1")).status_code == 404
            assert (await browser.get(f"{REMOVAL}?" + "&".join(f"tag=v{n}" for n in range(201)))).status_code == 400
            nothing = await browser.get(REMOVAL)  # the browser does so if a visitor logs in after the form was refused
            assert "No tag was chosen." in nothing.text
            assert (await browser.get(RESTORATION)).headers["location"] == HISTORY
        async with logged_in(server, "alice") as browser:
            for path in (HISTORY, f"{HISTORY}:v1", REMOVAL, DESCRIPTION):
                assert (await browser.get(path)).status_code == 404, path
        assert await all_tags(server.store, APP) == ["v1"]
        assert await server.store.descriptions.find_description(APP) is None


async def test_denied_forms_are_in_the_audit_log(tmp_path: Path) -> None:
    """The audit log has each denied form with the account, the path and the address, as for denied requests to the API.
    It does not have allowed requests."""
    async with site(tmp_path) as server:
        await push_image(server.store, APP, "only", "old1")
        async with logged_in(server, "alice", "pull") as browser:
            assert (await browser.get(PAGE)).status_code == 200
            digest = await digest_of_tag(server.store, "old1")
            for path in (REMOVAL, RESTORATION, "/ui/mirror/purge", "/ui/upkeep/start"):
                answer = await post(browser, path, tag=f"old1@{digest}", reference="ubuntu", kind="gc")
                assert answer.status_code == 403, path
        assert await denied_requests(server) == {
            ("alice", "page", path, "192.0.2.1")
            for path in (REMOVAL, RESTORATION, "/ui/mirror/purge", "/ui/upkeep/start")
        }


async def denied_requests(server: Site) -> set[tuple[str, str, str, str]]:
    """Returns the account, the action, the target and the address of all denied requests in the audit log."""
    await server.app.audit_buffer.aclose()
    denied = server.app.accounts.audit(AuditQuery(outcome="denied"), 100).items
    return {(entry.actor, entry.action, entry.target, entry.address) for entry in denied}


async def test_a_tag_is_restored_from_its_history(tmp_path: Path) -> None:
    """The history lists each change of a tag, and can restore an earlier digest, even if the tag was deleted. An
    immutable tag stays, and the page says why."""
    async with site(tmp_path, immutable=[{"repositories": ["team/**"], "tags": ["fixed*"]}]) as server:
        first = await push_image(server.store, APP, "first", "v1", "fixed")
        second = await push_image(server.store, APP, "second", "v1")
        async with logged_in(server, "alice", "pull,push,delete") as browser:
            page = (await browser.get(f"{HISTORY}:v1")).text
            assert hidden_fields(page, "digest") == [first.digest]
            answer = await post(browser, f"{HISTORY}:v1", digest=first.digest)
            assert (answer.status_code, answer.headers["location"]) == (303, f"{HISTORY}:v1")
            assert await digest_of_tag(server.store, "v1") == first.digest

            await post(browser, REMOVAL, tag=f"v1@{first.digest}")
            page = (await browser.get(f"{HISTORY}:v1")).text
            assert "The tag was deleted." in page
            assert (await post(browser, f"{HISTORY}:v1")).status_code == 303
            assert await digest_of_tag(server.store, "v1") == first.digest

            refused = await post(browser, f"{HISTORY}:fixed", digest=second.digest)
            assert refused.status_code == 403
            assert "The tag was not restored." in refused.text
            assert "immutable" in re.findall(r'<p class="message" lang="en">(.*)</p>', refused.text)[0]
            assert hidden_fields((await browser.get(f"{HISTORY}:fixed")).text, "digest") == []
            assert await digest_of_tag(server.store, "fixed") == first.digest

            changes = re.findall(rf'<td data-label="Tag"><a href="{HISTORY}:(\w+)"', (await browser.get(HISTORY)).text)
            assert (changes[:4], sorted(changes[4:])) == (["v1"] * 4, ["fixed", "v1"])
            assert (await browser.get(f"{HISTORY}:never")).status_code == 404
            assert (await browser.get(f"{HISTORY}@{first.digest}")).status_code == 404
        assert await denied_requests(server) == {("alice", "page", f"{HISTORY}:fixed", "192.0.2.1")}


async def test_a_long_history_has_pages(tmp_path: Path) -> None:
    """A long history has several pages. No page offers to restore the digest at which the tag points now."""
    async with site(tmp_path, accounts=False) as server:
        images = [await push_image(server.store, APP, f"{n}") for n in range(2)]
        for n in range(60):
            await server.store.put_manifest(APP, images[n % 2], [Tag("v1")], by=BY)
        async with server.browser() as browser:
            first = (await browser.get(f"{HISTORY}:v1")).text
            next_link = re.search(r'<a class="button" href="([^"]+after=[^"]+)"', first)
            assert next_link is not None
            second = (await browser.get(html.unescape(next_link[1]))).text
            assert [page.count('<th scope="row">') for page in (first, second)] == [50, 10]
            for page in (first, second):
                assert set(hidden_fields(page, "digest")) == {images[0].digest}


async def test_a_description_is_written(tmp_path: Path) -> None:
    """A preview saves nothing. HTML in a description is shown as text. If another person has changed the description
    meanwhile, the form is refused with 412 and keeps the text."""
    text = "\n# Title\n\n<script>alert(1)</script> [x](javascript:alert(1)) ![p](https://evil.example/p.png)\n"
    async with site(tmp_path) as server:
        await push_image(server.store, APP, "one", "v1")
        async with logged_in(server, "alice", "pull,push") as browser:
            preview = await post(browser, DESCRIPTION, text=text, revision="0", action="preview")
            assert preview.status_code == 200
            preview_html = preview.text.partition('<h2 id="preview">')[2]
            assert "<h3>Title</h3>" in preview_html
            for page in (preview.text, preview_html):
                assert "<script>alert" not in page
                assert 'href="javascript:' not in page
                assert "<img" not in page.partition("<main")[2]
            area = re.search(r"<textarea[^>]*>\n(.*?)</textarea>", preview.text, re.DOTALL)
            assert area is not None
            assert html.unescape(area[1]) == text
            assert await server.store.descriptions.find_description(APP) is None

            saved = await post(browser, DESCRIPTION, text=text.replace("\n", "\r\n"), revision="0", action="save")
            assert (saved.status_code, saved.headers["location"]) == (303, PAGE)
            stored = await server.store.descriptions.find_description(APP)
            assert stored is not None
            assert (stored.text, stored.actor) == (text, "alice")

            late = await post(browser, DESCRIPTION, text="mine", revision="0", action="save")
            assert late.status_code == 412
            assert "mine</textarea>" in late.text
            assert "<h3>Title</h3>" in late.text
            accepted = await post(
                browser, DESCRIPTION, text="mine", revision=hidden_fields(late.text, "revision")[0], action="save"
            )
            assert accepted.status_code == 303
            assert "<p>mine</p>" in (await browser.get(PAGE)).text
            revision = hidden_fields((await browser.get(DESCRIPTION)).text, "revision")[0]
            assert (await post(browser, DESCRIPTION, text="", revision=revision, action="save")).status_code == 303
            assert 'class="description"' not in (await browser.get(PAGE)).text


async def test_a_saved_description_is_rendered_once(tmp_path: Path) -> None:
    """The HTML that is made when a page saves a description is cached, with the headings that pages show. So the page
    of the repository is shown without another rendering."""
    async with site(tmp_path) as server:
        await push_image(server.store, APP, "app", "v1")
        assert server.app.app.service.access is not None
        renderings = server.app.app.service.access.management.repository_browser._descriptions.rendering_limits
        async with logged_in(server, "alice", "pull,push") as browser:
            saved = await post(browser, DESCRIPTION, action="save", text="# Hello", revision="0")
            assert saved.status_code == 303
            async with renderings.slot("somebody"), asyncio.timeout(30):
                assert "<h3>Hello</h3>" in (await browser.get(PAGE)).text
