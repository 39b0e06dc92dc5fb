"""Tests of the overview page in a real browser: the part with the current state, which updates itself, and the charts
of pulls and pushes."""

from __future__ import annotations

import time

import pytest
from playwright.sync_api import expect

from registry.ui.overview_page import OVERVIEW_PATH
from storage.activity import HOUR_SECONDS
from tests.fakes.admin_site import ADMIN, PASSWORD
from tests.fakes.clients.member_site import ROOT, SiteWithAccounts
from tests.fakes.page_browser import PageBrowser
from tests.fakes.page_site import MEMBER
from tests.fakes.plain_client import plain_request

CURRENT_STATE_PATH = f"{OVERVIEW_PATH}/now"


def test_current_state_updates_itself(site: SiteWithAccounts, browser: PageBrowser) -> None:
    """The part with the current state updates itself, without changing the rest of the page or the focus. A visitor can
    stop the updates. When the session has ended, the page leads to the login page."""
    with browser.tab(site.server.url) as tab:
        page = tab.page
        tab.log_in(ADMIN, PASSWORD)
        page.evaluate("window.isSamePage = true")
        page.evaluate("document.getElementById('now').dataset.first = ''")
        page.locator("#now-switch").focus()
        with page.expect_response(f"**{CURRENT_STATE_PATH}") as response:
            expect(page.locator("#now[data-first]")).to_have_count(0, timeout=60_000)
        assert response.value.status == 200
        assert page.evaluate("document.activeElement.id") == "now-switch"
        assert page.evaluate("window.isSamePage")
        assert tab.accessibility_problems() == []
        page.keyboard.press("Enter")
        page.wait_for_url("**?live=off")
        assert page.locator("#now[hx-get]").count() == 0
        page.locator("#now-switch").click()
        page.wait_for_url(f"**{OVERVIEW_PATH}")
        page.context.clear_cookies()
        page.wait_for_url("**/ui/login?next=**", timeout=60_000)


def number_in(text: str) -> int:
    """Returns the number, which has commas between the thousands."""
    return int(text.replace(",", ""))


@pytest.mark.parametrize("javascript", [True, False])
def test_charts_count_pulls(site: SiteWithAccounts, browser: PageBrowser, javascript: bool) -> None:
    """The charts include the pulls of all workers without delay. Each is shown as a picture with a text description,
    and as a table."""
    with browser.tab(site.server.url, javascript=javascript) as tab:
        tab.log_in(ADMIN, PASSWORD)
        figure = tab.page.locator("#today + dl div dd").first
        hour = None
        # Repeated if an hour has ended meanwhile, because the sum then loses its oldest hour.
        while hour != (hour := int(time.time() // HOUR_SECONDS)):
            tab.open(OVERVIEW_PATH)
            pulls_before = number_in(figure.inner_text())
            for _ in range(5):
                answer = plain_request(
                    "GET", f"{site.server.url}/v2/public/app/manifests/latest", headers={"authorization": ROOT.basic}
                )
                assert answer.status_code == 200
            tab.open(OVERVIEW_PATH)
            pulls_after = number_in(figure.inner_text())
        assert pulls_after == pulls_before + 5
        charts = tab.page.get_by_role("img", name="Pulls and pushes")
        expect(charts).to_have_count(2)
        assert f"Pulls: {pulls_after:,}." in charts.first.locator("desc").inner_html()
        assert charts.first.locator("rect").count() >= 1
        table = tab.page.locator("details").first
        expect(table.locator("table")).to_be_hidden()
        table.locator("summary").click()
        expect(table.locator("tbody tr")).to_have_count(24)
        if javascript:
            assert tab.accessibility_problems() == []


def test_overview_of_users_without_admin_rights(site: SiteWithAccounts, browser: PageBrowser) -> None:
    """An anonymous visitor and a user who is not an admin see counts of the repositories that they may pull, with links
    to the lists."""
    with browser.tab(site.server.url) as tab:
        tab.open(OVERVIEW_PATH)
        assert tab.page.locator(".facts dt").all_inner_texts() == ["Hosted"]
        tab.log_in(MEMBER, PASSWORD)
        assert tab.page.locator(".facts dt").all_inner_texts() == ["Hosted", "Cached from docker.io"]
        tab.page.locator(".facts a").last.click()
        assert tab.page.url.endswith("/ui/repositories?in=docker.io")
