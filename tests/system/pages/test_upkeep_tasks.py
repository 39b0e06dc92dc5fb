"""Tests of the web pages on which admins start upkeep jobs and see retention rules, in a real browser."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

from tests.fakes.admin_site import ADMIN, PASSWORD
from tests.fakes.clients.member_site import SiteWithAccounts
from tests.fakes.page_browser import PageBrowser


def test_page_shows_the_end_of_a_job(site: SiteWithAccounts, browser: PageBrowser) -> None:
    """A button starts a job. When the job is done, the page shows this without being loaded again."""
    with browser.tab(site.server.url) as tab:
        page = tab.page
        tab.log_in(ADMIN, PASSWORD)
        page.get_by_role("link", name="Upkeep", exact=True).click()
        page.get_by_role("button", name="See what garbage there is").click()
        page.wait_for_url("**/ui/upkeep#jobs")
        page.evaluate("window.isSamePage = true")
        expect(page.locator("#jobs tr", has_text="Garbage collection").first).to_contain_text("done")
        assert page.evaluate("window.isSamePage")
        assert tab.accessibility_problems() == []


@pytest.mark.parametrize("javascript", [True, False])
def test_page_shows_what_retention_would_delete(site: SiteWithAccounts, browser: PageBrowser, javascript: bool) -> None:
    """Before the retention rules are applied, the page asks whether to delete the tags. A link beside this question
    leads to a page that shows what the rules would delete in a repository."""
    with browser.tab(site.server.url, javascript=javascript) as tab:
        page = tab.page
        tab.log_in(ADMIN, PASSWORD)
        tab.open("/ui/upkeep")
        page.get_by_role("button", name="Apply retention").click()
        expect(page.locator("main")).to_contain_text("Delete all tags that no rule keeps?")
        assert not javascript or tab.accessibility_problems() == []
        page.get_by_role("link", name="The rules, and what they would delete").last.click()
        assert "crew/app" in page.locator("#rows").inner_text()
        page.fill("#repository", "crew/app")
        page.get_by_role("button", name="Show").click()
        page.wait_for_url("**/ui/upkeep/retention?repository=*")
        rows = page.locator("tbody tr")
        assert [row.locator("td").first.inner_text() for row in rows.all()] == ["kept", "kept"]
