"""Tests of the web page on which admins manage the mirror, in a real browser."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

from tests.fakes.admin_site import ADMIN, PASSWORD
from tests.fakes.clients.member_site import SiteWithAccounts
from tests.fakes.page_browser import PageBrowser
from tests.fakes.page_site import HOSTILE

UBUNTU = "docker.io/library/ubuntu"


def test_page_shows_the_progress_of_a_job(site: SiteWithAccounts, browser: PageBrowser) -> None:
    """A form starts a job that fetches images from an upstream that does not respond. When the job has failed, the page
    shows this without being loaded again. The focus does not move."""
    with browser.tab(site.server.url) as tab:
        page = tab.page
        tab.log_in(ADMIN, PASSWORD)
        page.get_by_role("link", name="Mirror", exact=True).click()
        page.fill("#references", "ubuntu:none\ndebian:12")
        page.get_by_role("button", name="Fetch").click()
        page.wait_for_url("**/ui/mirror#downloads")
        page.evaluate("window.isSamePage = true")
        page.locator("#references").focus()
        expect(page.locator("#downloads tr", has_text="failed").first).to_contain_text("Warming of the cache")
        assert page.evaluate("window.isSamePage")
        assert page.evaluate("document.activeElement.id") == "references"
        assert tab.accessibility_problems() == []


@pytest.mark.parametrize("javascript", [True, False])
def test_freeze_unfreeze_and_purge_a_cached_image(
    site: SiteWithAccounts, browser: PageBrowser, javascript: bool
) -> None:
    """An admin finds a cached image with the filter, freezes its tag and unfreezes it. A purge asks for confirmation
    and can be cancelled. HTML in an image reference is shown as text."""
    with browser.tab(site.server.url, javascript=javascript) as tab:
        tab.allowed_errors.append("the server responded with a status of 4")
        page = tab.page
        tab.log_in(ADMIN, PASSWORD)
        tab.open("/ui/mirror/images")
        page.locator("#q").press_sequentially("UBUN")
        if not javascript:
            page.get_by_role("button", name="Filter").click()
        page.wait_for_url("**q=UBUN*")
        row = page.locator("#rows tr", has_text="24.04")
        expect(row.locator("th a")).to_have_text(UBUNTU)
        row.get_by_role("combobox").select_option("24.04")
        row.get_by_role("button", name="Freeze", exact=False).first.click()
        assert page.locator("h1").inner_text() == f"{UBUNTU}:24.04"
        assert "The tag is frozen" in page.get_by_role("status").first.inner_text()
        page.get_by_role("link", name="Back").click()
        page.get_by_role("button", name=f"Unfreeze {UBUNTU}:24.04").click()
        assert "follows the upstream again" in page.locator("main").inner_text()
        assert not javascript or tab.accessibility_problems() == []
        page.get_by_role("link", name="Back").click()
        page.fill("#reference", f"{UBUNTU}:24.04")
        page.get_by_role("button", name="Purge", exact=True).click()
        expect(page.locator("main")).to_contain_text("Delete this image from the cache?")
        assert not javascript or tab.accessibility_problems() == []
        page.get_by_role("link", name="Cancel").click()
        page.fill("#reference", f"{UBUNTU}:24.04")
        page.get_by_role("button", name="Purge the repository").click()
        expect(page.get_by_role("heading", name=UBUNTU, exact=True)).to_be_visible()
        page.get_by_role("link", name="Cancel").click()
        page.fill("#reference", HOSTILE)
        page.get_by_role("button", name="Freeze", exact=True).click()
        assert page.locator("h1").inner_text() == HOSTILE
        assert page.get_by_role("alert").count() == 1
        assert not javascript or tab.accessibility_problems() == []
