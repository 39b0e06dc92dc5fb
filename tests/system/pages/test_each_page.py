"""Tests that open every web page in a real browser: as each kind of visitor, in both languages, in dark and light
colours, in wide and narrow windows, with and without JavaScript."""

from __future__ import annotations

import pytest

from tests.fakes.admin_site import PASSWORD
from tests.fakes.clients.member_site import SiteWithAccounts
from tests.fakes.page_browser import PageBrowser, Tab
from tests.fakes.page_site import VISITORS, PageVisitor

LANGUAGES = {"en-US": "en", "zh-CN": "zh-Hans"}
CLIENTS = ("docker", "podman", "containerd", "k3s", "kind", "buildkit", "nas", "ci")
CLIENTS_WITH_ALL_PARTS = ("docker", "kind")
"""The clients whose set-up pages together have all parts: files, commands and hints. The other set-up pages have only
some of these parts."""

PAGES_THAT_DIFFER = ("/ui/login", "/ui/overview", "/ui/account", "/ui/repositories/public/described")
"""The pages that look different for an admin and for other visitors."""


def pages_of(visitor: PageVisitor, clients: tuple[str, ...] = CLIENTS) -> list[str]:
    """Returns the paths of the pages that this visitor can open."""
    pages = [
        "/ui/login",
        "/ui/overview",
        "/ui/repositories",
        "/ui/repositories?q=none",
        "/ui/repositories/public/described",
    ]
    pages += ["/ui/repositories/public/described:v1", "/ui/search?q=app"]
    pages += ["/ui/comparison/public/described?tag=v1&tag=v1", "/ui/tag-history/public/tools:1"]
    pages += [f"/ui/setup?client={client}" for client in clients]
    if visitor.name is not None:
        pages += ["/ui/repositories?in=docker.io", "/ui/repositories/docker.io/library/ubuntu"]
        pages.append("/ui/repositories/docker.io/library/ubuntu:latest")
        pages.append("/ui/account")
    if visitor is VISITORS["admin"]:
        pages += ["/ui/system", "/ui/description/public/described", "/ui/tag-removal/public/tools?tag=1&tag=2&tag=none"]
        pages += ["/ui/mirror", "/ui/mirror/downloads", "/ui/mirror/images"]
        pages += ["/ui/upkeep", "/ui/upkeep/jobs", "/ui/upkeep/retention?repository=crew/app"]
        pages += [f"/ui/access{part}" for part in ("", "/robots", "/groups", "/grants", "/tokens")]
        pages += ["/ui/access/rights?account=alice&repository=crew/app", "/ui/access/accounts/alice"]
        pages += ["/ui/access/groups/crew", "/ui/activity"]
    return pages


def enter(tab: Tab, visitor: PageVisitor) -> None:
    """Logs in, unless the visitor is anonymous."""
    if visitor.name is not None:
        tab.log_in(visitor.name, PASSWORD)


def check_page(tab: Tab, language: str, visitor: PageVisitor) -> None:
    """Checks what must hold on every page: the language, one heading, the title, no images or scripts in the content,
    no names that the visitor must not see, and no horizontal scrolling."""
    page = tab.page
    assert page.locator("html").get_attribute("lang") == language
    assert page.locator("h1").count() == 1
    assert page.title().endswith("· Entrepot")
    assert page.locator("main script, main img").count() == 0
    content = page.content()
    for name in visitor.sees_not:
        assert name not in content
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


@pytest.mark.parametrize("kind", VISITORS)
def test_each_page_is_accessible(site: SiteWithAccounts, browser: PageBrowser, kind: str) -> None:
    """The accessibility checker axe finds no problem on any page, in light colours, in dark colours, and in a window as
    narrow as a phone. In both languages, no page is wider than the window, writes to the console, or sends a request to
    another site.

    To save time, each rule of axe is checked once for each page: all rules in English, the contrast of the dark colours
    in English, and the sizes on a phone in Chinese, which has the shortest words. Only the admin opens every page in
    Chinese; others open those that look different for them.
    """
    visitor = VISITORS[kind]
    paths_to_check = {
        path for path in pages_of(visitor, CLIENTS_WITH_ALL_PARTS) if kind == "admin" or path in PAGES_THAT_DIFFER
    }
    for locale, language in LANGUAGES.items():
        with browser.tab(site.server.url, language=locale) as tab:
            enter(tab, visitor)
            for path in pages_of(visitor, CLIENTS_WITH_ALL_PARTS):
                if language != "en" and path not in paths_to_check:
                    continue
                tab.open(path)
                check_page(tab, language, visitor)
                if path in paths_to_check and language == "en":
                    assert tab.accessibility_problems() == [], path
                    tab.page.emulate_media(color_scheme="dark")
                    assert tab.accessibility_problems("color-contrast") == [], path
                    tab.page.emulate_media(color_scheme="light")
                tab.page.set_viewport_size({"width": 360, "height": 700})
                check_page(tab, language, visitor)
                if path in paths_to_check and language != "en":
                    assert tab.accessibility_problems("target-size", "scrollable-region-focusable") == [], path
                tab.page.set_viewport_size({"width": 1200, "height": 900})


@pytest.mark.parametrize(
    ("kind", "locale"), [("admin", "en-US"), ("admin", "zh-CN"), ("member", "zh-CN"), ("nobody", "en-US")]
)
def test_each_page_without_javascript(site: SiteWithAccounts, browser: PageBrowser, kind: str, locale: str) -> None:
    """Without JavaScript, a visitor can log in and open each page. The list of repositories has those that the visitor
    may see. Buttons that need a script are hidden."""
    visitor = VISITORS[kind]
    with browser.tab(site.server.url, language=locale, javascript=False, dark=True, width=360) as tab:
        enter(tab, visitor)
        for path in pages_of(visitor):
            tab.open(path)
            assert tab.page.locator("html").get_attribute("lang") == LANGUAGES[locale]
            assert tab.page.locator("h1").count() == 1
            assert tab.page.locator("button.copy:visible").count() == 0
            assert [name for name in visitor.sees_not if name in tab.page.content()] == []
        names: list[str] = []
        tab.open("/ui/repositories")
        while True:
            names += tab.page.locator("#rows li").all_inner_texts()
            more = tab.page.locator("#more a")
            if not more.count():
                break
            more.click()
        assert set(visitor.sees) <= set(names)
        assert len(names) == len(set(names))


@pytest.mark.parametrize("locale", LANGUAGES)
def test_error_pages(site: SiteWithAccounts, browser: PageBrowser, locale: str) -> None:
    """The error pages for 400, 403 and 404 are accessible, and HTML in a URL has no effect on them."""
    with browser.tab(site.server.url, language=locale) as tab:
        tab.allowed_errors.append("the server responded with a status of 4")
        tab.log_in(VISITORS["member"].name or "", PASSWORD)
        for path, status in (
            ("/ui/nothing", "404"),
            ("/ui/system", "403"),
            ("/ui/repositories?q=a&q=b", "400"),
            ("/ui/repositories/%3Cimg%20src=x%20onerror=alert(1)%3E", "404"),
            ("/ui/setup?client=%22%3E%3Cscript%3Ealert(1)%3C/script%3E", "404"),
            ("/ui/repositories?in=%3Cscript%3Ealert(1)%3C/script%3E", "404"),
        ):
            tab.open(path)
            assert tab.page.locator(".status").inner_text() == status
            assert tab.page.locator("main script, main img").count() == 0
            assert tab.accessibility_problems() == [], path
