"""Tests of the web pages for accounts, permissions and the audit log, in a real browser."""

from __future__ import annotations

import re

import httpx2
import pytest
from playwright.sync_api import Page, expect

from tests.fakes.admin_site import ADMIN, PASSWORD
from tests.fakes.clients.member_site import SiteWithAccounts
from tests.fakes.page_browser import PageBrowser, Tab


def press(page: Page, name: str) -> None:
    """Clicks the first button with this name."""
    page.locator("main").get_by_role("button", name=name, exact=True).first.click()


def log_in(tab: Tab, name: str, password: str = PASSWORD) -> Page:
    """Logs in, and returns the page of the tab."""
    tab.log_in(name, password)
    return tab.page


@pytest.mark.parametrize("javascript", [True, False])
def test_admin_adds_a_robot_with_a_grant_and_a_token(
    site: SiteWithAccounts, browser: PageBrowser, javascript: bool
) -> None:
    """An admin adds a robot account, a grant (permission) and an API token. The page that tests permissions shows what
    the robot may do. The secret of the token is shown once, can be used, and is refused after the token was revoked."""
    name = site.name("robot")
    with browser.tab(site.server.url, javascript=javascript) as tab:
        page = log_in(tab, ADMIN)
        page.get_by_role("link", name="Access", exact=True).click()
        page.get_by_role("link", name="Robots").click()
        page.fill("#name", name)
        press(page, "Add")
        expect(page.locator("h1")).to_have_text(name)
        page.locator("summary").click()
        page.fill("#note", "for the test")
        page.fill("#limits", "public/**:pull")
        press(page, "Add an API token")
        secret = page.locator("#secret").inner_text()
        assert page.locator("button.copy:visible").count() == (1 if javascript else 0)
        page.get_by_role("link", name="Back").click()
        expect(page.locator("#token-rows th")).to_contain_text("for the test")
        assert secret not in page.content()
        page.get_by_role("link", name="Grants", exact=True).click()
        page.select_option("#kind", "robot")
        page.fill("#name", name)
        page.fill("#pattern", f"{name}/**")
        page.get_by_role("checkbox", name="push").check()
        press(page, "Add")
        page.get_by_role("link", name="Who may do what?").click()
        page.fill("#account", name)
        page.fill("#repository", f"{name}/app")
        press(page, "Test")
        expect(page.locator("dd.yes")).to_have_count(2)
        expect(page.locator("#grants-1 th")).to_have_text(f"{name}/**")
        assert site.call("GET", "/me", auth=(name, secret)).json()["name"] == name
        tab.open(f"/ui/access/accounts/{name}")
        page.get_by_role("button", name="Revoke for the test").click()
        expect(page.get_by_role("heading", name="Revoke the API token for the test?")).to_be_visible()
        page.get_by_role("link", name="Cancel").click()
        page.get_by_role("button", name="Revoke for the test").click()
        press(page, "Revoke")
        expect(page.locator("#token-rows")).to_have_count(0)
        assert site.call("GET", "/me", auth=(name, secret)).status_code == 401


@pytest.mark.parametrize("javascript", [True, False])
def test_users_manage_their_own_account(site: SiteWithAccounts, browser: PageBrowser, javascript: bool) -> None:
    """Users see their permissions. On the page of their account, they can end the session that they have in another
    browser. They can change their password without being logged out."""
    name, password = site.user()
    site.grant(f"user:{name}", {f"{name}/**": "pull"})
    new_password = "another long password"
    with browser.tab(site.server.url) as other_browser, browser.tab(site.server.url, javascript=javascript) as tab:
        tab.allowed_errors.append("the server responded with a status of 4")
        log_in(other_browser, name, password)
        page = log_in(tab, name, password)
        page.get_by_role("link", name=name, exact=True).click()
        expect(page.locator("h1")).to_have_text("Your account")
        assert f"{name}/**" in page.locator("main").inner_text()
        rows = page.locator("section[aria-labelledby=sessions] tbody tr")
        expect(rows).to_have_count(2)
        rows.filter(has_not_text="this browser").get_by_role("button").click()
        expect(rows).to_have_count(1)
        other_browser.open("/ui/repositories")
        assert "Your session has ended" in other_browser.page.locator("main").inner_text()
        for old_password, message in (("wrong", "The old password is wrong."), (password, None)):
            page.fill("#old", old_password)
            page.fill("#new", new_password)
            page.fill("#again", new_password)
            press(page, "Set the password")
            if message:
                expect(page.get_by_role("alert")).to_have_text(message)
        expect(page.get_by_role("alert")).to_have_count(0)
        assert site.call("GET", "/me", auth=(name, password)).status_code == 401
        assert site.call("GET", "/me", auth=(name, new_password)).status_code == 200
        rows.get_by_role("button").click()
        expect(page.locator(".account")).to_have_count(0)


def test_confirmation_opens_as_a_dialog(site: SiteWithAccounts, browser: PageBrowser) -> None:
    """With JavaScript, a request for confirmation opens as a dialog over the page. Escape closes the dialog and returns
    the focus to the button. The confirmed action is performed. If the session has ended, the button leads to the login
    page."""
    name = site.robot()
    with browser.tab(site.server.url) as tab:
        page = log_in(tab, ADMIN)
        tab.open(f"/ui/access/accounts/{name}")
        page.get_by_role("button", name="Delete", exact=True).press("Enter")
        dialog = page.get_by_role("dialog", name=f"Delete the account {name}?")
        expect(dialog.get_by_role("link", name="Cancel")).to_be_focused()
        assert tab.accessibility_problems() == []
        page.keyboard.press("Escape")
        expect(dialog).to_have_count(0)
        expect(page.get_by_role("button", name="Delete", exact=True)).to_be_focused()
        page.keyboard.press("Enter")
        dialog.get_by_role("button", name="Delete").click()
        page.wait_for_url("**/ui/access/robots")
        assert site.call("GET", f"/robots/{name}").status_code == 404
        tab.open("/ui/upkeep")
        page.context.clear_cookies()
        page.get_by_role("button", name="Apply retention").click()
        page.wait_for_url("**/ui/login?**")


def test_audit_log_is_filtered_without_loading_the_page(site: SiteWithAccounts, browser: PageBrowser) -> None:
    """A filter changes the rows of the audit log without loading the page again. More rows are added at the end on
    request. The URL contains the filters, so it can be bookmarked."""
    name, _ = site.user()
    for number in range(55):
        site.grant(f"user:{name}", {f"{name}/{number}": "pull"})
    with browser.tab(site.server.url) as tab:
        page = log_in(tab, ADMIN)
        page.get_by_role("link", name="Activity", exact=True).click()
        page.evaluate("window.isSamePage = true")
        page.fill("#repository", f"user:{name}")
        page.press("#repository", "Tab")  # the browser reports the change now
        page.wait_for_url(f"**repository=user%3A{name}**")
        page.select_option("#action", "grant.put")
        page.wait_for_url("**action=grant.put**")
        rows = page.locator("#rows tr")
        expect(rows.first).to_contain_text(f"user:{name}")
        expect(rows).to_have_count(50)
        expect(page.locator("#more a")).to_have_attribute("href", re.compile(r"action=grant\.put"))
        page.locator("#more a").click()
        expect(rows).to_have_count(55)
        expect(page.locator("#more a")).to_have_count(0)
        assert page.evaluate("window.isSamePage")
        page.reload()
        assert rows.count() == 50
        page.locator("#rows a").first.click()
        expect(page.locator("h1")).to_have_text(name)


def test_form_of_another_site_is_refused(site: SiteWithAccounts, browser: PageBrowser) -> None:
    """The browser of a logged-in admin submits a form of another site. The browser states the origin of the form, so
    the server refuses it."""
    name = site.name("robot")
    with browser.tab(site.server.url) as tab:
        tab.allowed_errors.append("the server responded with a status of 4")
        page = log_in(tab, ADMIN)
        page.goto("about:blank")
        page.set_content(
            f'<form method="post" action="{site.server.url}/ui/access/robots"><input name="name" value="{name}">'
            "<button>Win</button></form>"
        )
        page.click("button")
        expect(page.locator(".status")).to_have_text(re.compile("403|404"))
        assert site.call("GET", f"/robots/{name}").status_code == 404


def test_response_with_a_secret_is_not_stored(site: SiteWithAccounts) -> None:
    """The page with the secret of a new account is the direct response to the form, so it has no URL of its own.
    Browsers must not store it (`no-store`)."""
    with httpx2.Client(base_url=site.server.url) as client:
        from_page = {"sec-fetch-site": "same-origin"}
        client.post("/ui/login", data={"user": ADMIN, "password": PASSWORD}, headers=from_page)
        answer = client.post("/ui/access", data={"name": site.name()}, headers=from_page)
        assert 'id="secret"' in answer.text
        assert answer.headers["cache-control"] == "no-store"
