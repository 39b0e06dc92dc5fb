"""Tests of the web pages on which users change a repository, in a real browser: tags and descriptions."""

from __future__ import annotations

import pytest
from playwright.sync_api import Page, expect

from tests.fakes.admin_site import ADMIN, PASSWORD
from tests.fakes.clients.member_site import SiteWithAccounts
from tests.fakes.page_browser import PageBrowser
from tests.fakes.page_site import HOSTILE, MEMBER

TOOLS = "/ui/repositories/public/tools"


def tags_on(page: Page) -> list[str]:
    """Returns the tags that the page lists."""
    return page.locator("#rows th a").all_inner_texts()


@pytest.mark.parametrize("javascript", [True, False])
def test_delete_two_tags_and_undo(site: SiteWithAccounts, browser: PageBrowser, javascript: bool) -> None:
    """An admin selects tags, sees what would be deleted, deletes them, and restores them, all with the keyboard."""
    with browser.tab(site.server.url, javascript=javascript) as tab:
        page = tab.page
        tab.log_in(ADMIN, PASSWORD)
        tab.open(TOOLS)
        for tag in ("2", "3"):
            page.get_by_label(f"Choose {tag}", exact=True).press("Space")
        page.get_by_role("button", name="Delete…").press("Enter")
        page.wait_for_url("**/ui/tag-removal/public/tools?tag=2&tag=3")
        assert page.locator("tbody th").all_inner_texts() == ["2", "3"]
        page.get_by_role("button", name="Delete", exact=True).press("Enter")
        page.get_by_role("heading", name="Deleted tags").wait_for()
        if javascript:
            assert tab.accessibility_problems() == []
        page.get_by_role("button", name="Undo").press("Enter")
        page.get_by_role("heading", name="Restored tags").wait_for()
        if javascript:
            assert tab.accessibility_problems() == []
        page.get_by_role("link", name="Back to the tags").press("Enter")
        page.wait_for_url(f"**{TOOLS}")
        assert tags_on(page) == ["1", "2", "3"]


def test_checkbox_for_all_tags(site: SiteWithAccounts, browser: PageBrowser) -> None:
    """A checkbox selects all tags that are shown. It shows whether all, some or none are selected. Without JavaScript
    it is hidden."""
    with browser.tab(site.server.url) as tab:
        page = tab.page
        tab.log_in(ADMIN, PASSWORD)
        tab.open(TOOLS)
        all_box = page.get_by_label("All that are shown")
        all_box.press("Space")
        assert page.locator("#rows input:checked").count() == 3
        page.get_by_label("Choose 2", exact=True).uncheck()
        assert all_box.evaluate("box => [box.checked, box.indeterminate]") == [False, True]
        page.get_by_label("Choose 2", exact=True).check()
        assert all_box.is_checked()
        page.get_by_role("button", name="Delete…").click()
        page.wait_for_url("**/ui/tag-removal/public/tools?tag=*&tag=*&tag=*")
    with browser.tab(site.server.url, javascript=False) as tab:
        tab.open(TOOLS)
        expect(tab.page.get_by_label("All that are shown")).to_be_hidden()


@pytest.mark.parametrize("javascript", [True, False])
def test_restore_and_compare(site: SiteWithAccounts, browser: PageBrowser, javascript: bool) -> None:
    """On the history page of a tag, a user restores an earlier state of the tag. In the list of tags, the user selects
    two tags and compares them."""
    with browser.tab(site.server.url, javascript=javascript) as tab:
        page = tab.page
        tab.log_in(ADMIN, PASSWORD)
        tab.open(f"{TOOLS}:1")
        page.get_by_role("link", name="History of this tag").click()
        page.wait_for_url("**/ui/tag-history/public/tools:1")
        changes = page.locator("#rows tr").count()
        page.get_by_role("button", name="Restore").first.click()
        page.locator(f"#rows tr:nth-child({changes + 1})").wait_for()
        tab.open(TOOLS)
        page.get_by_label("Choose 1", exact=True).check()
        page.get_by_label("Choose 2", exact=True).check()
        page.get_by_role("button", name="Compare two").click()
        page.wait_for_url("**/ui/comparison/public/tools?tag=1&tag=2")
        assert page.get_by_role("table", name="Layers only in the first").locator("tbody tr").count() == 1
        if javascript:
            assert tab.accessibility_problems() == []


@pytest.mark.parametrize("javascript", [True, False])
def test_edit_a_description(site: SiteWithAccounts, browser: PageBrowser, javascript: bool) -> None:
    """A user who may push sees a preview of a description, saves it, and removes it again. HTML in the description is
    shown as text."""
    with browser.tab(site.server.url, javascript=javascript) as tab:
        page = tab.page
        tab.log_in(MEMBER, PASSWORD)
        tab.open("/ui/repositories/crew/app")
        page.get_by_role("link", name="Write a description").click()
        page.get_by_label("Text, in Markdown").fill(f"# Ours\n\n{HOSTILE}")
        page.get_by_role("button", name="Preview").click()
        page.get_by_role("heading", name="Ours").wait_for()
        if javascript:
            assert tab.accessibility_problems() == []
        assert page.locator("main script, main img").count() == 0
        page.get_by_role("button", name="Save").click()
        page.wait_for_url("**/ui/repositories/crew/app")
        assert HOSTILE in page.locator(".description").inner_text()
        assert page.title() == "crew/app · Entrepot"
        page.get_by_role("link", name="Edit the description").click()
        page.get_by_label("Text, in Markdown").fill("")
        page.get_by_role("button", name="Save").click()
        page.wait_for_url("**/ui/repositories/crew/app")
        assert page.locator(".description").count() == 0
