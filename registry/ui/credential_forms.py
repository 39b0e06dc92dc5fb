"""Handles the forms with which a visitor changes the API tokens and the login sessions of an account.

The parameter `form` has the fields that the visitor sent. The parameter `back` is the path of the page to which the
visitor returns after the change.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from fastapi import Request, Response

from registry.admin.caller import Caller
from registry.admin.cookies import SESSION_COOKIE
from registry.auth.administration import parse_limit
from registry.http.query import Query
from registry.request import RequestInvalid
from registry.ui.account_pages import HOME_PATH
from registry.ui.form_answers import Question, ask, field_text, is_confirmed, show_secret
from registry.ui.languages import translatable
from registry.ui.page_route import cookies_of, redirect
from storage.access import AccountInvalid, AccountName, ApiToken, Grant, LoginSession, TokenLimit

LIFETIMES: Final = {
    "30": translatable("30 days"),
    "90": translatable("90 days"),
    "365": translatable("1 year"),
    "": translatable("does not expire"),
}
"""The lifetimes that an API token can have: maps the number of days to its label. The empty key means no expiry."""
MAX_SHOWN_ROWS: Final = 200
"""Largest number of rows in each list on a page about an account or a group: grants, API tokens, refresh tokens."""
_MAX_LIMITS: Final = 50
"""Largest number of limits of one API token. A *limit* allows the token some actions on some repositories."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """The tokens and login sessions of an account. `tokens`: first the API tokens that people have made, then the
    refresh tokens of clients. `has_more_tokens`: whether the account has tokens that are not in `tokens`.
    `current_session_id`: the id of the session that the visitor uses now; None if the visitor uses no session."""

    tokens: list[ApiToken]
    has_more_tokens: bool
    sessions: list[LoginSession]
    current_session_id: str | None


def credentials_of(caller: Caller, account: AccountName) -> Credentials:
    """Returns the credentials of an account. Does not check whether the visitor may see them."""
    api_tokens = caller.accounts.tokens(account, None, MAX_SHOWN_ROWS, purpose="personal")
    refresh_tokens = caller.accounts.tokens(account, None, MAX_SHOWN_ROWS, purpose="login")
    return Credentials(
        [*api_tokens.items, *refresh_tokens.items],
        api_tokens.more or refresh_tokens.more,
        caller.administration.sessions(account),
        caller.rights.session_id,
    )


def grants_that_apply(caller: Caller, account: str, groups: Iterable[str] = ()) -> tuple[list[Grant], bool]:
    """Returns the first `MAX_SHOWN_ROWS` grants that apply to an account, and whether there are more. A *grant* gives
    accounts or a group rights on repositories. `groups`: names of further groups of the account, from a token issuer or
    from the OpenID provider. The account's groups in the store always count."""
    page = caller.accounts.grant_page(caller.administration.subjects_of(account, groups), None, MAX_SHOWN_ROWS)
    return list(page.items), page.more


async def add_token(request: Request, caller: Caller, account: AccountName, form: Query, back: str) -> Response:
    """Creates the API token that a form describes, and returns a page with the token's secret. Raises AccountInvalid,
    Denied, RequestInvalid."""
    caller.rights.check_may_change_credentials(account)
    days = field_text(form, "days")
    if days not in LIFETIMES:
        raise RequestInvalid("an API token cannot have this lifetime")
    token, secret = await caller.administration.add_token(
        account,
        note=field_text(form, "note"),
        expires_in=float(days) * 86400 if days else None,
        limits=_parse_limits(form.one("limits") or ""),
        expected_version=caller.version_of(account),
        by=caller.actor,
    )
    return await show_secret(
        request,
        title=translatable("API token of %(name)s"),
        note=translatable("Use it in place of the password of %(name)s, for example with docker login."),
        name=token.account,
        secret=secret,
        back=back,
        section=_section(back),
    )


def _parse_limits(text: str) -> list[TokenLimit]:
    """Parses the limits of a token, one on each line. Raises AccountInvalid."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) > _MAX_LIMITS:
        raise AccountInvalid(f"an API token has at most {_MAX_LIMITS} limits")
    return [parse_limit(line) for line in lines]


async def revoke_token(request: Request, caller: Caller, form: Query, back: str) -> Response:
    """Revokes the API token that a form names. If the visitor has not confirmed the revocation yet, only returns a page
    that asks for the confirmation. Raises AccountUnknown, Denied."""
    token, _secret_hash = caller.accounts.token(field_text(form, "token"))
    caller.rights.check_may_revoke(token)
    if not is_confirmed(form):
        question = Question(
            title=translatable("Revoke the API token %(name)s?"),
            consequence=translatable("Every program that uses it is refused from now on. This cannot be undone."),
            button=translatable("Revoke"),
            name=token.note or token.id,
            back=back,
            section=_section(back),
            fields={"do": "revoke", "token": token.id},
        )
        return await ask(request, question)
    await caller.administration.revoke_token(token.id, by=caller.actor)
    return redirect(back)


async def end_session(request: Request, caller: Caller, form: Query, back: str) -> Response:
    """Ends the login session that a form names. If it is the visitor's current session, also deletes the cookie. Raises
    AccountUnknown, Denied."""
    session, _secret_hash = caller.accounts.login_session(field_text(form, "session"))
    caller.rights.check_may_end(session)
    await caller.administration.end_session(session.id, by=caller.actor)
    if session.id != caller.rights.session_id:
        return redirect(back)
    response = redirect(HOME_PATH)
    cookies_of(request).delete(response, SESSION_COOKIE)
    return response


async def end_sessions(caller: Caller, account: AccountName, back: str) -> Response:
    """Ends all login sessions of an account except the visitor's current session. Raises AccountUnknown, Denied."""
    caller.rights.check_may_end_sessions(account)
    await caller.administration.end_sessions(account, except_id=caller.rights.session_id, by=caller.actor)
    return redirect(back)


def _section(path: str) -> str:
    """Returns the name of the navigation section that contains the page at `path`; empty if no section contains it."""
    return "access" if path.startswith("/ui/access") else ""
