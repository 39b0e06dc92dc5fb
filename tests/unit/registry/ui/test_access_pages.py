"""The pages about accounts and rights, the visitor's own account, and the audit log. The tests send requests without a
browser."""

from __future__ import annotations

import re
import time
from pathlib import Path

import httpx2
import pytest

from registry.auth.token import api_tokens
from registry.ui.credential_forms import MAX_SHOWN_ROWS
from storage.access import AccountName, AuditEntry, AuditQuery, Grantee
from storage.patterns import NamePattern
from tests.fakes.store_accounts import BY, add_account, add_grant
from tests.unit.registry.ui.test_pages import FROM_PAGE, PASSWORD, Site, site

ADMIN_PAGES = (
    *("", "/robots", "/groups", "/grants", "/tokens", "/rights", "/rights?account=alice&repository=team/app"),
    *("/accounts/alice", "/accounts/none", "/groups/dev"),
)
HOSTILE = "<script>alert(1)</script>"


async def send(browser: httpx2.AsyncClient, path: str, **fields: str | list[str]) -> httpx2.Response:
    return await browser.post(path, data=fields, headers=FROM_PAGE)


def secret_on_page(answer: httpx2.Response) -> str:
    """Returns the password or token that the page shows once."""
    assert answer.status_code == 200, answer.text
    match = re.search(r'<code id="secret">([^<]+)</code>', answer.text)
    assert match is not None
    return match[1]


def problem_on_page(answer: httpx2.Response) -> tuple[int, str]:
    """Returns the status of the response, and the error text on the page."""
    match = re.search(r'<p class="problem" role="alert" id="problem">(.*?)</p>', answer.text)
    assert match is not None, answer.text
    return answer.status_code, re.sub(r"<[^>]+>", "", match[1]).strip()


@pytest.mark.slow
async def test_the_pages_are_for_admins_only(tmp_path: Path) -> None:
    """Anonymous visitors are redirected to the login form. Members, who are not admins, get 403, whether or not the
    page exists. These refusals are in the audit log."""
    async with site(tmp_path) as server:
        paths = [f"/ui/access{path}" for path in ADMIN_PAGES] + ["/ui/activity"]
        forms = ["/ui/access", "/ui/access/robots", "/ui/access/groups", "/ui/access/grants", "/ui/access/tokens"]
        forms += ["/ui/access/accounts/root", "/ui/access/groups/dev"]
        async with server.browser() as browser:
            for path in (*paths, "/ui/account"):
                assert (await browser.get(path)).headers["location"].startswith("/ui/login?next=/ui/"), path
            for path in (*forms, "/ui/account"):
                assert (await send(browser, path, do="delete")).headers["location"].startswith("/ui/login"), path
            await server.log_in(browser, "alice")
            for path in paths:
                assert (await browser.get(path)).status_code == 403, path
            for path in forms:
                answer = await send(browser, path, do="delete", name="eve", confirmed="yes")
                assert answer.status_code == 403, path
            assert 'href="/ui/access"' not in (await browser.get("/ui/account")).text
            await server.log_in(browser, "root")
            assert 'href="/ui/access"' in (await browser.get("/ui/account")).text
        await server.app.audit_buffer.aclose()
        denied = server.app.accounts.audit(AuditQuery(actor="alice", outcome="denied"), 100).items
        assert {entry.target for entry in denied} >= {"/ui/access", "/ui/activity", "/ui/access/accounts/root"}


async def test_forged_forms_change_nothing(tmp_path: Path) -> None:
    """A page of another site cannot change accounts or rights through an admin's browser."""
    async with site(tmp_path) as server, server.browser() as browser:
        await server.log_in(browser, "root")
        for headers in ({"sec-fetch-site": "cross-site"}, {"origin": "https://evil.example"}, {}):
            for path, fields in (
                ("/ui/access", {"name": "eve", "admin": "yes"}),
                ("/ui/access/accounts/alice", {"do": "delete", "confirmed": "yes"}),
                ("/ui/access/grants", {"do": "put", "kind": "everyone", "pattern": "**", "action": "pull"}),
                ("/ui/account", {"do": "token", "days": ""}),
            ):
                assert (await browser.post(path, data=fields, headers=headers)).status_code == 403
        assert [each.name for each in server.app.accounts.accounts(None, None, 10).items] == ["alice", "root"]
        assert server.app.accounts.grants() == []


@pytest.mark.slow
async def test_an_account_is_added_changed_and_deleted(tmp_path: Path) -> None:
    """An admin adds an account. The page shows the account's password once. The admin disables and enables the account,
    makes it an admin, changes its password, and deletes it. Changes that are hard to undo need a confirmation."""
    async with site(tmp_path) as server, server.browser() as browser, server.browser() as persons_browser:
        await server.log_in(browser, "root")
        password = secret_on_page(await send(browser, "/ui/access", name="carol", note=HOSTILE))
        assert (await server.log_in(persons_browser, "carol", password=password)).status_code == 303
        page = await browser.get("/ui/access?q=car")
        assert re.findall(r'accounts/([^"]+)">', page.text) == ["carol"]
        assert HOSTILE not in page.text
        path = "/ui/access/accounts/carol"

        async def redirect_after(**fields: str) -> str:
            answer = await send(browser, path, **fields)
            assert answer.status_code == 303, answer.text
            return str(answer.headers["location"])

        for action in ("disable", "make-admin", "delete"):
            question = await send(browser, path, do=action)
            assert question.status_code == 200
            assert 'name="confirmed" value="yes"' in question.text
            assert f'name="do" value="{action}"' in question.text
        account = server.app.accounts.account(AccountName("carol"))
        assert (account.enabled, account.admin) == (True, False)
        assert await redirect_after(do="disable", confirmed="yes") == path
        assert "Your session has ended" in (await persons_browser.get("/ui/repositories")).text
        await redirect_after(do="enable")
        await redirect_after(do="make-admin", confirmed="yes")
        assert server.app.accounts.account(AccountName("carol")).admin
        await redirect_after(do="unmake-admin")
        await redirect_after(do="password", password="another long password")
        assert (await server.log_in(persons_browser, "carol", password="another long password")).status_code == 303
        assert secret_on_page(await send(browser, path, do="password")) != password
        assert await redirect_after(do="delete", confirmed="yes") == "/ui/access"
        assert (await browser.get(path)).status_code == 404


async def test_a_token_that_expires_in_the_year_29405(tmp_path: Path) -> None:
    """Earlier versions accepted a lifetime of any length. The pages and the API show a stored token that expires after
    the year 9999 with the last time of that year."""
    async with site(tmp_path) as server, server.browser() as browser:
        token = api_tokens.make(AccountName("alice"), now=0.0, expires=9999999 * 86400.0)
        await server.app.accounts.add_token(token.token, token.secret_hash, by=BY)
        await server.log_in(browser, "root")
        for path in ("/ui/access/tokens", "/ui/access/accounts/alice"):
            assert "9999-12-31 23:59 UTC" in (await browser.get(path)).text
        answer = await browser.get("/api/v1/tokens", params={"account": "alice"}, auth=("root", PASSWORD))
        assert answer.status_code == 200, answer.text
        assert [item["expires"] for item in answer.json()["items"]] == ["9999-12-31T23:59:59Z"]


async def test_an_exact_match_is_on_the_first_page(tmp_path: Path) -> None:
    """The list of the accounts whose names begin with a text starts with the account of exactly this name. A page has
    at most 50 accounts, and the pages together list each account once."""
    async with site(tmp_path) as server, server.browser() as browser:
        names = ["car", *(f"car{number:02}" for number in range(60))]
        for name in names:
            await add_account(server.app.accounts, name)
        await server.log_in(browser, "root")
        first = re.findall(r'accounts/([^"]+)">', (await browser.get("/ui/access?q=car")).text)
        assert first == names[:50]
        second = re.findall(r'accounts/([^"]+)">', (await browser.get(f"/ui/access?q=car&after={first[-1]}")).text)
        assert second == names[50:]


async def test_the_page_states_the_error_in_a_form(tmp_path: Path) -> None:
    """The page says what is wrong with the form, and keeps the values that were entered, except passwords."""
    async with site(tmp_path) as server, server.browser() as browser:
        await server.log_in(browser, "root")
        conflict = await send(browser, "/ui/access", name="alice", note="a note", password="secret words here")
        assert problem_on_page(conflict) == (409, "This name is taken.")
        assert 'value="a note"' in conflict.text
        assert "secret words" not in conflict.text
        status, text = problem_on_page(await send(browser, "/ui/access/robots", name=HOSTILE))
        assert (status, "is no name for an account" in text, HOSTILE in text) == (400, True, False)
        assert problem_on_page(await send(browser, "/ui/access", name="eve", password="short"))[0] == 400
        for action in ("disable", "delete", "unmake-admin"):
            answer = await send(browser, "/ui/access/accounts/root", do=action, confirmed="yes")
            assert problem_on_page(answer)[0] == 409, action
        grant = {"do": "put", "kind": "user", "name": "alice"}
        assert (
            problem_on_page(await send(browser, "/ui/access/grants", **grant, pattern="a*b/c", action="pull"))[0] == 400
        )
        status, text = problem_on_page(await send(browser, "/ui/access/grants", **grant, pattern="a/**"))
        assert (status, "no action is named" in text) == (400, True)
        unknown_group = {"do": "put", "kind": "group", "name": "none", "pattern": "a", "action": "pull"}
        status, text = problem_on_page(await send(browser, "/ui/access/grants", **unknown_group))
        assert (status, "there is no group none" in text) == (404, True)
        assert server.app.accounts.grants() == []
        for path in ("/ui/access/grants", "/ui/access/tokens", "/ui/access/accounts/alice", "/ui/account"):
            assert (await send(browser, path, do="nonsense")).status_code == 400, path


async def test_groups_and_grants(tmp_path: Path) -> None:
    """A group gets a member and a grant. The page *rights* then shows what the member may do, and the grant that allows
    it. After the grant and the group are removed, nothing is left of them."""
    async with site(tmp_path) as server, server.browser() as browser:
        await server.log_in(browser, "root")
        assert (await send(browser, "/ui/access/groups", name="dev")).headers["location"] == "/ui/access/groups/dev"
        await send(browser, "/ui/access/groups/dev", do="join", member="alice")
        grant = {"do": "put", "kind": "group", "name": "dev", "pattern": "team/**"}
        answer = await send(browser, "/ui/access/grants", **grant, action=["pull", "push"])
        assert answer.headers["location"] == "/ui/access/grants"
        rights_path = "/ui/access/rights?account=alice&repository=team/app"
        page = (await browser.get(rights_path)).text
        # The top of the page still names the visitor, and not the account whose rights the page shows.
        assert '<span class="account">root</span>' in page
        rights_if_hosted, rights_if_mirrored = ["yes", "yes", "no", "no"], ["no"] * 4  # pull, push, delete, admin
        assert re.findall(r'<dd class="(yes|no)">', page) == rights_if_hosted + rights_if_mirrored
        assert 'href="/ui/access/groups/dev"' in page
        assert (
            re.findall(r'<dd class="(yes|no)">', (await browser.get(rights_path.replace("alice", ""))).text)
            == ["no"] * 8
        )
        assert "may do everything" in (await browser.get(rights_path.replace("alice", "root"))).text
        assert problem_on_page(await browser.get("/ui/access/rights?repository=../etc"))[0] == 400
        for path in ("/ui/access/groups/dev", "/ui/access/accounts/alice", "/ui/access/grants?subject=group:dev"):
            assert "<code>team/**</code>" in (await browser.get(path)).text
        assert "<code>team/**</code>" not in (await browser.get("/ui/access/grants?subject=everyone")).text
        remove = {"do": "remove", "subject": "group:dev", "pattern": "team/**"}
        assert (await send(browser, "/ui/access/grants", **remove)).status_code == 200
        assert len(server.app.accounts.grants()) == 1
        assert (await send(browser, "/ui/access/grants", **remove, confirmed="yes")).status_code == 303
        assert server.app.accounts.grants() == []
        await send(browser, "/ui/access/groups/dev", do="leave", member="alice")
        assert server.app.accounts.group(AccountName("dev"))[1] == ()
        await send(browser, "/ui/access/groups/dev", do="delete", confirmed="yes")
        assert (await browser.get("/ui/access/groups/dev")).status_code == 404


async def test_api_tokens(tmp_path: Path) -> None:
    """An admin can make a token for a robot, and a member can make a token for their own account. The token is shown
    once and can have limits. It is revoked after a confirmation. A member cannot revoke the token of another
    account, and the audit log records the attempt."""
    async with site(tmp_path) as server, server.browser() as browser, server.browser() as members_browser:
        await server.log_in(browser, "root")
        await server.log_in(members_browser, "alice")
        await send(browser, "/ui/access/robots", name="ci")
        path = "/ui/access/accounts/ci"
        secret = secret_on_page(
            await send(browser, path, do="token", days="30", note=HOSTILE, limits="team/**:pull\r\n\r\nx/app:push")
        )
        (token,) = server.app.accounts.tokens(AccountName("ci"), None, 10).items
        assert token.id in secret
        assert token.expires == pytest.approx(token.created + 30 * 86400)
        assert [limit.pattern for limit in token.limits or ()] == ["team/**", "x/app"]
        for page in (path, "/ui/access/tokens"):
            text = (await browser.get(page)).text
            assert token.id in text
            assert secret not in text
            assert HOSTILE not in text
        own = secret_on_page(await send(members_browser, "/ui/account", do="token", days="", note="laptop"))
        assert own not in (await members_browser.get("/ui/account")).text
        assert "laptop" in (await members_browser.get("/ui/account")).text
        for wrong_fields in (
            {"days": "1000000"},
            {"days": "", "limits": "nonsense"},
            {"days": "30", "note": "x" * 300},
        ):
            assert (await send(members_browser, "/ui/account", do="token", **wrong_fields)).status_code == 400
        revoke = {"do": "revoke", "token": token.id, "confirmed": "yes"}
        assert problem_on_page(await send(members_browser, "/ui/account", **revoke))[0] == 404
        assert (await send(browser, "/ui/access/tokens", do="revoke", token=token.id)).status_code == 200
        assert server.app.accounts.tokens(AccountName("ci"), None, 10).items
        assert (await send(browser, "/ui/access/tokens", **revoke)).status_code == 303
        assert not server.app.accounts.tokens(AccountName("ci"), None, 10).items
        await server.app.audit_buffer.aclose()
        (denied,) = server.app.accounts.audit(AuditQuery(actor="alice", outcome="denied"), 100).items
        assert (denied.action, denied.target) == ("page", "/ui/account")


@pytest.mark.slow
async def test_refresh_tokens_do_not_hide_api_tokens(tmp_path: Path) -> None:
    """The pages about an account list the API tokens that people have made before the refresh tokens of clients, of
    which an account can have more than a page shows."""
    async with site(tmp_path) as server, server.browser() as browser:
        account = AccountName("alice")
        for number in range(MAX_SHOWN_ROWS + 1):
            login = api_tokens.make(account, now=time.time(), purpose="login", note=f"docker at 10.0.0.{number}")
            await server.app.accounts.add_token(login.token, login.secret_hash, by=BY)
        notes = [f"made by alice {number}" for number in range(5)]
        for note in notes:
            made = api_tokens.make(account, now=time.time(), note=note)
            await server.app.accounts.add_token(made.token, made.secret_hash, by=BY)
        for visitor, path in (("alice", "/ui/account"), ("root", "/ui/access/accounts/alice")):
            await server.log_in(browser, visitor)
            page = (await browser.get(path)).text
            shown = re.findall(r'<tr>\n<th scope="row">((?:made by|docker at)[^<]*)<br>', page)
            assert sorted(shown[:5]) == notes
            assert len(shown) == MAX_SHOWN_ROWS + 5
            assert "There are more than are shown here." in page


async def test_sessions_can_be_ended(tmp_path: Path) -> None:
    """Visitors can end their own sessions on the page about their account. Admins can end the sessions of others. When
    a visitor ends the present session, the visitor is logged out."""
    async with (
        site(tmp_path) as server,
        server.browser(**{"user-agent": HOSTILE}) as first,
        server.browser() as second,
        server.browser() as admin,
    ):
        for browser, name in ((first, "alice"), (second, "alice"), (admin, "root")):
            await server.log_in(browser, name)
        page = (await second.get("/ui/account")).text
        assert HOSTILE not in page
        assert page.count("this browser") == 1
        newest, oldest = re.findall(r'name="session" value="([^"]+)"', page)
        (of_admin,) = re.findall(r'name="session" value="([^"]+)"', (await admin.get("/ui/account")).text)
        assert problem_on_page(await send(second, "/ui/account", do="end-session", session=of_admin))[0] == 404
        assert (await send(second, "/ui/account", do="end-session", session=oldest)).status_code == 303
        assert "Your session has ended" in (await first.get("/ui/repositories")).text
        assert (await send(second, "/ui/account", do="end-session", session=newest)).headers["location"] == "/ui/"
        assert (await second.get("/ui/account")).status_code == 303
        await server.log_in(first, "alice")
        await server.log_in(second, "alice")
        assert (await send(second, "/ui/account", do="end-sessions")).headers["location"] == "/ui/account"
        assert (await first.get("/ui/account")).status_code == 303
        assert (await second.get("/ui/account")).status_code == 200
        await send(admin, "/ui/access/accounts/alice", do="end-sessions")
        assert (await second.get("/ui/account")).status_code == 303
        assert (await admin.get("/ui/account")).status_code == 200


@pytest.mark.slow
async def test_visitors_change_their_own_password(tmp_path: Path) -> None:
    """To change their password, visitors have to enter the old one. After the change, this session continues, and all
    other sessions of the account have ended. The admins' page about an account does not ask for the old password, so
    admins cannot use it to change their own."""
    async with site(tmp_path) as server, server.browser() as browser, server.browser() as other:
        await server.log_in(browser, "alice")
        await server.log_in(other, "alice")
        new = "quite another password"

        async def change(old: str, new: str, repeated: str) -> httpx2.Response:
            return await send(browser, "/ui/account", do="password", old=old, new=new, again=repeated)

        assert problem_on_page(await change(PASSWORD, new, new + "x")) == (400, "The two new passwords differ.")
        assert problem_on_page(await change("wrong", new, new)) == (403, "The old password is wrong.")
        assert problem_on_page(await change(PASSWORD, "short", "short"))[0] == 400
        assert (await change(PASSWORD, new, new)).headers["location"] == "/ui/account"
        assert (await browser.get("/ui/account")).status_code == 200
        assert (await other.get("/ui/account")).status_code == 303
        assert (await server.log_in(other, "alice", password=new)).status_code == 303
        await server.log_in(browser, "root")
        answer = await send(browser, "/ui/access/accounts/root", do="password", password=new)
        assert answer.status_code == 403


@pytest.mark.slow
async def test_visitors_see_their_own_grants(tmp_path: Path) -> None:
    """Members see the grants that apply to them, without links to change these. They do not see the grants of
    others."""
    async with site(tmp_path) as server, server.browser() as browser:
        for subject in ("user:alice", "authenticated", "everyone", "user:bob"):
            await add_grant(server.app.accounts, subject, f"{subject.replace(':', '-')}/**", "pull")
        await server.log_in(browser, "alice")
        page = (await browser.get("/ui/account")).text
        assert re.findall(r"<code>([\w-]+)/\*\*</code>", page) == ["authenticated", "everyone", "user-alice"]
        assert "/ui/access" not in page


async def activity(browser: httpx2.AsyncClient, query: str) -> list[str]:
    """Returns the actions in the rows of the page, with their targets."""
    answer = await browser.get(f"/ui/activity?{query}")
    assert answer.status_code == 200, answer.text
    rows = re.findall(
        r'<td data-label="Action">(.*?)</td>\s*<td data-label="Target">(.*?)</td>', answer.text, re.DOTALL
    )
    return [" ".join(re.sub(r"<[^>]+>", "", part).strip() for part in row) for row in rows]


@pytest.mark.slow
async def test_the_audit_log_is_filtered_and_paged(tmp_path: Path) -> None:
    """The page filters the entries by its query, and has links to further pages. The parameter `repository` filters by
    the target of the action, which can also be a group."""
    async with site(tmp_path) as server, server.browser() as browser:
        await server.log_in(browser, "root")
        await fill_audit_log(server)
        assert (await activity(browser, "period=hour"))[0] == "Grant removed user:alice"
        assert await activity(browser, "action=grant.remove") == ["Grant removed user:alice"]
        assert await activity(browser, "account=nobody-here") == []
        assert await activity(browser, "repository=group:dev") == ["Grant added or changed group:dev"]
        assert await activity(browser, "outcome=denied") == ["Push team/app"]
        assert await activity(browser, "repository=team/app&account=eve&period=month") == ["Push team/app"]
        assert await activity(browser, "account=eve&period=day") == []
        assert await activity(browser, "outcome=failed") == ["odd.action &lt;b&gt;"]
        # The oldest entry, `odd.action`, is from 2001-09-09T01:46:40 UTC. Entries have to be older than `until`.
        assert await activity(browser, "until=2001-09-09T01:47") == ["odd.action &lt;b&gt;"]
        assert await activity(browser, "until=2001-09-09T01:46:40") == []
        assert await activity(browser, "until=2001-09-09T09:47%2B08:00&period=hour") == ["odd.action &lt;b&gt;"]
        assert await activity(browser, "until=2001-09-10T01:47&period=hour") == []
        listed, path = [], "action=grant.put"
        while path:
            listed += await activity(browser, path)
            page = (await browser.get(f"/ui/activity?{path}")).text
            next_link = re.search(r'<a class="button" href="/ui/activity\?([^"]+)"', page)
            path = next_link[1].replace("&amp;", "&") if next_link else ""
        assert len(listed) == 61  # one grant of the group, and sixty of alice
        for wrong in ("outcome=odd", "period=year", "until=tomorrow", "after=nonsense", "account=a&account=b"):
            assert (await browser.get(f"/ui/activity?{wrong}")).status_code == 400, wrong


async def fill_audit_log(server: Site) -> None:
    await server.app.accounts.add_audit_entries(
        [
            AuditEntry(time.time() - 2 * 86400, "eve", "push", "team/app", "denied", address="192.0.2.7"),
            # 1e9 is 2001-09-09T01:46:40 UTC.
            AuditEntry(1e9, "eve", "odd.action", "<b>", "failed", detail={"<i>": ["<u>", 1]}),
        ]
    )
    await server.app.accounts.add_group(AccountName("dev"), by=BY)
    await add_grant(server.app.accounts, "group:dev", "team/**", "pull")
    for number in range(60):
        await add_grant(server.app.accounts, "user:alice", f"many/{number}", "pull")
    await server.app.accounts.remove_grant(Grantee.parse("user:alice"), NamePattern("many/0"), by=BY)


@pytest.mark.slow
async def test_the_first_account(tmp_path: Path) -> None:
    """While there are no accounts, only a browser on the registry's own machine may add one. The first account has to
    be a person and becomes an admin."""
    async with site(tmp_path, accounts=False) as server:
        async with server.browser() as remote:
            assert (await remote.get("/ui/access")).status_code == 403
            assert (await send(remote, "/ui/access", name="root", password=PASSWORD)).status_code == 403
        transport = httpx2.ASGITransport(app=server.app.app, client=("127.0.0.1", 1), raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as local:
            assert "The first account" in (await local.get("/ui/access")).text
            assert problem_on_page(await send(local, "/ui/access/robots", name="ci"))[0] == 400
            assert (await send(local, "/ui/access", name="root", password=PASSWORD)).headers["location"] == "/ui/login"
            assert server.app.accounts.account(AccountName("root")).admin
            assert (await local.get("/ui/access")).headers["location"] == "/ui/login?next=/ui/access"
