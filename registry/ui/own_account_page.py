"""The page *Your account*, on which a visitor who is logged in sees their rights, and changes their API tokens, login
sessions, and password."""

from __future__ import annotations

from typing import Final

from fastapi import APIRouter, Request, Response

from registry.admin.browser_login import LOGIN_PAGE_PATH
from registry.admin.caller import Caller, require_login
from registry.admin.cookies import SESSION_COOKIE
from registry.admin.management_route import audit_denial
from registry.admin.password_change import change_password
from registry.auth.token.login_sessions import SESSION_SECONDS
from registry.http.query import Query
from registry.ui.credential_forms import (
    LIFETIMES,
    add_token,
    credentials_of,
    end_session,
    end_sessions,
    grants_that_apply,
    revoke_token,
)
from registry.ui.form_answers import FORM_ERRORS, FormProblem, problem_of, unknown_change_error
from registry.ui.languages import translatable
from registry.ui.page_route import (
    FormRoute,
    PageRoute,
    caller_of,
    cookies_of,
    page_response,
    page_slot,
    receive_form,
    redirect,
)
from storage.access import Account, AccountHidden, AccountName, AccountUnknown
from storage.errors import Denied, RegistryError

OWN_ACCOUNT_PATH: Final = "/ui/account"

router = APIRouter(route_class=PageRoute, include_in_schema=False)
forms = APIRouter(route_class=FormRoute, include_in_schema=False)
"""The routes of forms. Their handlers call `page_slot` before they render a page, to limit how many pages are rendered
at a time."""


@router.get(OWN_ACCOUNT_PATH)
async def own_account(request: Request) -> Response:
    """Shows the account of the visitor. Raises Unauthorized, Denied."""
    caller = await _logged_in_visitor(request)
    return await _own_page(request, caller, AccountName(caller.rights.account_name))


@forms.post(OWN_ACCOUNT_PATH)
async def change_own_account(request: Request) -> Response:
    """Makes the change of the visitor's account that the form's field `do` names. If the change is not possible, shows
    the page again, with the reason. Raises Unauthorized, Denied."""
    caller, form = await receive_form(request, _logged_in_visitor)
    name = AccountName(caller.rights.account_name)
    try:
        return await _change(request, caller, name, form)
    except FORM_ERRORS as error:
        if isinstance(error, AccountHidden):  # the only denial in `FORM_ERRORS`
            audit_denial(request, "page")
        problem = problem_of(error)
    except _PasswordRefused as error:
        problem = error.problem
    async with page_slot(request):
        return await _own_page(request, caller, name, problem)


async def _logged_in_visitor(request: Request) -> Caller:
    """Returns the visitor. Raises Unauthorized if the visitor is not logged in.

    While the registry has no accounts, nobody can log in. During this time, a visitor on the registry's own machine
    need not be logged in. A visitor on any other machine gets Denied."""
    return await require_login(caller_of(request))


class _PasswordRefused(Exception):
    """The password was not changed. `problem` states the reason: the old password in the form is wrong, or the two new
    passwords differ."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.problem = FormProblem(status, text)


async def _change(request: Request, caller: Caller, name: AccountName, form: Query) -> Response:
    change = form.one("do")
    if change == "token":
        return await add_token(request, caller, name, form, OWN_ACCOUNT_PATH)
    if change == "revoke":
        return await revoke_token(request, caller, form, OWN_ACCOUNT_PATH)
    if change == "end-session":
        return await end_session(request, caller, form, OWN_ACCOUNT_PATH)
    if change == "end-sessions":
        return await end_sessions(caller, name, OWN_ACCOUNT_PATH)
    if change == "password":
        return await _change_password(request, caller, name, form)
    raise unknown_change_error()


async def _change_password(request: Request, caller: Caller, name: AccountName, form: Query) -> Response:
    """Sets the password of the visitor. This ends all sessions of the account, so the visitor's browser then gets a new
    session. If the new session cannot be started, redirects to the login page. Raises _PasswordRefused, AccountInvalid,
    Denied, TooManyRequests."""
    old, new = form.one("old") or "", form.one("new") or ""
    if not new or new != form.one("again"):
        raise _PasswordRefused(400, translatable("The two new passwords differ."))
    caller.rights.check_may_change_credentials(name)
    try:
        await change_password(caller, name, old, new)
    except Denied:
        audit_denial(request, "page")
        raise _PasswordRefused(403, translatable("The old password is wrong.")) from None
    login = request.app.service.access.management.browser_login
    response = redirect(OWN_ACCOUNT_PATH)
    try:
        session = await login.start_with_password(name, new, caller.actor, replaces=cookies_of(request).session)
    except RegistryError:  # the new password is set, so the visitor can log in with it
        return redirect(f"{LOGIN_PAGE_PATH}?next={OWN_ACCOUNT_PATH}")
    cookies_of(request).set(response, SESSION_COOKIE, session, SESSION_SECONDS)
    return response


async def _own_page(
    request: Request, caller: Caller, name: AccountName, problem: FormProblem | None = None
) -> Response:
    identity = caller.principal.identity
    grants, has_more_grants = grants_that_apply(caller, name, identity.groups)
    stored = _stored_account(caller, name)
    groups = dict.fromkeys((*caller.accounts.groups_of(name), *identity.groups))
    return await page_response(
        request,
        "own_account.html",
        status_code=200 if problem is None else problem.status,
        section="account",
        here=OWN_ACCOUNT_PATH,
        name=name,
        groups=list(groups),
        grants=grants,
        has_more_grants=has_more_grants,
        credentials=credentials_of(caller, name),
        lifetimes=LIFETIMES,
        may_make_tokens=stored is not None and caller.rights.is_logged_in_as_person,
        has_password=stored is not None and stored.has_password,
        problem=problem,
    )


def _stored_account(caller: Caller, name: AccountName) -> Account | None:
    """Returns the visitor's account in the store. Returns None if the store does not have the account, because the
    account is in the htpasswd file or was just removed."""
    if caller.principal.identity.version is None:  # only accounts in the store have a version
        return None
    try:
        return caller.accounts.account(name)
    except AccountUnknown:
        return None


router.routes.extend(forms.routes)
