"""Tests of common tasks on the web pages, in a real browser: login, search, lists of repositories and tags, and
language."""

from __future__ import annotations

from urllib.parse import urlsplit

import pytest
from playwright.sync_api import expect

from tests.fakes.admin_site import PASSWORD
from tests.fakes.clients.member_site import SiteWithAccounts
from tests.fakes.page_browser import PageBrowser
from tests.fakes.page_site import HOSTILE, MANY, MEMBER


def test_chosen_language_is_kept(site: SiteWithAccounts, browser: PageBrowser) -> None:
    """At first the pages have the language of the browser. If the visitor chooses another language, later pages keep
    it, even without JavaScript."""
    with browser.tab(site.server.url, language="zh-CN", javascript=False) as tab:
        tab.open("/ui/setup?client=podman")
        assert tab.page.locator("h1").inner_text() == "客户端配置"
        tab.page.get_by_role("button", name="English").click()
        assert tab.page.url.endswith("/ui/setup?client=podman")
        assert tab.page.locator("h1").inner_text() == "Set-up"
        tab.open("/ui/repositories")
        assert tab.page.locator("h1").inner_text() == "Repositories"
        tab.page.get_by_role("button", name="简体中文").click()
        assert tab.page.locator("h1").inner_text() == "仓库"


@pytest.mark.parametrize("javascript", [True, False])
def test_log_in_and_out(site: SiteWithAccounts, browser: PageBrowser, javascript: bool) -> None:
    """A page that needs an account leads to the login form. After the login, the form leads back to the page. If the
    password is wrong, the form shows an error and keeps the user name."""
    with browser.tab(site.server.url, javascript=javascript) as tab:
        tab.allowed_errors.append("the server responded with a status of 4")
        page = tab.page
        tab.open("/ui/repositories/crew/app")
        assert urlsplit(page.url).path == "/ui/login"
        page.fill("#user", MEMBER)
        page.fill("#password", "wrong")
        page.click("button.main")
        assert page.get_by_role("alert").inner_text() == "The user name or the password is wrong."
        assert page.input_value("#user") == MEMBER
        page.fill("#password", PASSWORD)
        page.click("button.main")
        assert page.locator("h1").inner_text() == "crew/app"
        assert page.locator(".account").inner_text() == MEMBER
        page.get_by_role("button", name="Log out").click()
        assert page.locator(".account").count() == 0


def test_filter_and_load_more_repositories(site: SiteWithAccounts, browser: PageBrowser) -> None:
    """The list of repositories is filtered while the user types, and more rows are added at its end, both without
    loading the page again. The URL with the filter can be bookmarked."""
    with browser.tab(site.server.url) as tab:
        page = tab.page
        tab.open("/ui/repositories")
        page.evaluate("window.isSamePage = true")
        page.locator("#q").press_sequentially("zoo/")
        page.wait_for_url("**/ui/repositories?*q=zoo%2F*")  # the list for "zoo" may come before
        rows = page.locator("#rows li")
        expect(rows.first).to_have_text("zoo/00")
        page.locator("#more a").click()
        expect(rows).to_have_count(MANY)
        assert page.locator("#more a").count() == 0
        assert rows.all_inner_texts() == [f"zoo/{n:02}" for n in range(MANY)]
        assert page.evaluate("window.isSamePage")
        page.locator("#q").fill("zoo/5")
        expect(rows).to_have_count(10)
        page.reload()
        assert rows.count() == 10
        page.go_back()


@pytest.mark.parametrize("javascript", [True, False])
def test_search_for_a_pull_command_leads_to_the_tag(
    site: SiteWithAccounts, browser: PageBrowser, javascript: bool
) -> None:
    """A pull command in the search field of a page leads to the page of the tag. From there, links lead to a platform,
    to a signature, and back to the repository. HTML from images and descriptions is shown as text."""
    with browser.tab(site.server.url, javascript=javascript) as tab:
        page = tab.page
        tab.open("/ui/setup")
        page.fill("#find", f"docker pull {site.server.address}/public/described:v1")
        page.press("#find", "Enter")
        page.wait_for_url("**/ui/repositories/public/described:v1")
        assert page.get_by_text("RUN make").count() == 1
        assert page.locator(".missing").inner_text() == "linux/arm64 not here"
        page.get_by_role("link", name="linux/amd64").click()
        page.wait_for_url("**platform=sha256*")
        assert HOSTILE in page.locator("main").inner_text()
        page.locator(".referrers a").first.click()
        page.wait_for_url("**/public/described@sha256*")
        assert HOSTILE in page.locator("pre.text").first.inner_text()
        page.locator(".crumbs a").last.click()
        expect(page.locator("h3")).to_have_text("Described")
        assert HOSTILE in page.locator(".description").inner_text()
        assert page.locator(".description a[href]").count() == 0
        assert page.locator("main script, main img").count() == 0


def test_search_while_typing(site: SiteWithAccounts, browser: PageBrowser) -> None:
    """Search results appear while the user types. Enter on a complete reference opens the page of the tag."""
    with browser.tab(site.server.url) as tab:
        page = tab.page
        tab.open("/ui/search")
        page.evaluate("window.isSamePage = true")
        page.locator("#q").press_sequentially("publ")
        expect(page.locator(".hits a").first).to_have_text("public/app")
        page.locator("#q").fill("public/described:v1")
        expect(page.locator(".target a")).to_have_text("public/described:v1")
        assert page.evaluate("window.isSamePage")
        page.press("#q", "Enter")
        page.wait_for_url("**/ui/repositories/public/described:v1")


def test_sort_and_filter_tags(site: SiteWithAccounts, browser: PageBrowser) -> None:
    """A click on a sort order sorts the tags, and another click reverses the order. The filter is kept."""
    with browser.tab(site.server.url) as tab:
        page = tab.page
        tab.open("/ui/repositories/public/app")
        tags = page.locator("#rows th a")
        expect(tags).to_have_text(["1.0", "latest"])
        page.get_by_role("link", name="Name").click()
        expect(tags).to_have_text(["latest", "1.0"])
        page.locator("#q").press_sequentially("LAT")
        page.wait_for_url("**q=LAT*")  # the tags with "L" and "LA" may come before
        expect(tags).to_have_count(1)
        page.get_by_role("link", name="Version").click()
        page.wait_for_url("**sort=-version*")
        expect(tags).to_have_text(["latest"])
        assert page.input_value("#q") == "LAT"


def test_keyboard_navigation(site: SiteWithAccounts, browser: PageBrowser) -> None:
    """The first Tab leads to the link that skips the navigation. Every focused element has a visible outline."""
    with browser.tab(site.server.url) as tab:
        page = tab.page
        tab.open("/ui/repositories")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        assert page.evaluate("document.activeElement.getBoundingClientRect().top") >= 0
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "main"
        focused = []
        for _ in range(6):
            page.keyboard.press("Tab")
            focused.append(page.evaluate("document.activeElement.id || document.activeElement.innerText"))
            assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        assert focused[:2] == ["q", "Filter"]
        page.keyboard.press("Enter")  # opens the repository whose link has the focus now
        page.wait_for_url("**/ui/repositories/**")


def test_copied_digests_and_local_times(site: SiteWithAccounts, browser: PageBrowser) -> None:
    """A digest is shown shortened, and its button copies the whole digest. Times are shown in the time zone of the
    visitor."""
    with browser.tab(
        site.server.url,
        timezone_id="Asia/Shanghai",
        language="zh-CN",
        permissions=["clipboard-read", "clipboard-write"],
    ) as tab:
        page = tab.page
        tab.log_in("root", PASSWORD)
        tab.open("/ui/repositories/public/app")
        digest = page.locator("td .digest code").first
        full_digest = digest.get_attribute("title")
        assert full_digest is not None
        assert full_digest.startswith(digest.inner_text())
        page.locator("td .digest button.copy").first.click()
        expect(page.locator("#said")).to_have_text("已复制")
        assert page.evaluate("navigator.clipboard.readText()") == full_digest
        tab.open("/ui/system")
        time = page.locator("time").first
        moment = time.get_attribute("datetime")
        expected_time = page.evaluate(
            "moment => new Intl.DateTimeFormat('zh-Hans', {dateStyle: 'medium', timeStyle: 'short', "
            "timeZone: 'Asia/Shanghai'}).format(new Date(moment))",
            moment,
        )
        assert time.inner_text() == expected_time
        assert (time.get_attribute("title") or "").endswith(" UTC")


def test_ended_session(site: SiteWithAccounts, browser: PageBrowser) -> None:
    """After the session has ended, the next page states this, and shows only what anonymous visitors may see."""
    name, password = site.user()
    site.grant(f"user:{name}", {"crew/**": "pull"})
    with browser.tab(site.server.url) as tab:
        tab.log_in(name, password)
        tab.open("/ui/repositories")
        assert tab.page.get_by_role("link", name="crew/app").count() == 1
        site.call_ok("PATCH", f"/users/{name}", {"enabled": False})
        tab.page.get_by_role("link", name="Repositories", exact=True).first.click()
        assert "Your session has ended" in tab.page.locator("main").inner_text()
        assert tab.page.get_by_role("link", name="crew/app").count() == 0


def test_pages_cannot_be_framed_by_another_site(site: SiteWithAccounts, browser: PageBrowser) -> None:
    """The browser refuses to show a page of the registry in a frame of another site."""
    with browser.tab(site.server.url) as tab:
        tab.allowed_errors += ["frame-ancestors", "X-Frame-Options", "Framing"]
        tab.page.set_content(f'<iframe src="{site.server.url}/ui/login"></iframe>')
        frame = tab.page.frames[1]
        frame.wait_for_load_state()
        assert frame.locator("#password").count() == 0
