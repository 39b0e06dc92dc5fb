"""The page about one account, for admins: its rights, groups, API tokens and login sessions, and the forms that change
it.

The fields of a form are a `Query`, because the body of a POST request with a form has the format of a query string.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from fastapi import APIRouter, Request, Response

from registry.admin.caller import Caller
from registry.admin.password_change import change_password
from registry.http.query import Query
from registry.ui.access_pages import ACCESS_PATH, ACCOUNTS_PATH, ROBOTS_PATH, account_path, show_password
from registry.ui.credential_forms import (
    LIFETIMES,
    add_token,
    credentials_of,
    end_session,
    end_sessions,
    grants_that_apply,
    revoke_token,
)
from registry.ui.form_answers import (
    FORM_ERRORS,
    FormProblem,
    Question,
    ask,
    is_confirmed,
    problem_of,
    unknown_change_error,
)
from registry.ui.languages import translatable
from registry.ui.page_route import FormRoute, PageRoute, admin_of, page_response, page_slot, receive_form, redirect
from storage.access import Account, AccountKind, AccountName
from storage.errors import Denied

router = APIRouter(route_class=PageRoute, include_in_schema=False)
forms = APIRouter(route_class=FormRoute, include_in_schema=False)
"""The routes that receive the forms. The handlers of these routes run without a *slot*, the permit to render a page. A
handler that renders a page must therefore acquire a slot itself (`page_slot`)."""


@router.get(f"{ACCOUNTS_PATH}/{{name}}")
async def account(request: Request, name: str) -> Response:
    """Shows an account. Raises Unauthorized, Denied, AccountInvalid, AccountUnknown."""
    caller = await admin_of(request)
    return await _account_page(request, caller, caller.accounts.account(AccountName(name)))


@forms.post(f"{ACCOUNTS_PATH}/{{name}}")
async def change_account(request: Request, name: str) -> Response:
    """Changes an account. The field `do` of the form must be a key of `_CHANGES`. If the change fails with one of
    `FORM_ERRORS`, shows the page again, with the reason. Raises Unauthorized, Denied, AccountInvalid, AccountUnknown,
    RequestInvalid."""
    caller, form = await receive_form(request, admin_of)
    change = _CHANGES.get(form.one("do") or "")
    if change is None:
        raise unknown_change_error()
    shown_account = caller.accounts.account(AccountName(name))
    try:
        return await change(request, caller, shown_account, form)
    except FORM_ERRORS as error:
        async with page_slot(request):
            return await _account_page(request, caller, shown_account, problem_of(error))


async def _account_page(
    request: Request, caller: Caller, shown_account: Account, problem: FormProblem | None = None
) -> Response:
    grants, has_more_grants = grants_that_apply(caller, shown_account.name)
    return await page_response(
        request,
        "access_account.html",
        status_code=200 if problem is None else problem.status,
        section="access",
        here=account_path(shown_account.name),
        shown=shown_account,
        is_own=caller.rights.name == shown_account.name,
        list_path=_list_path(shown_account),
        grants=grants,
        has_more_grants=has_more_grants,
        credentials=credentials_of(caller, shown_account.name),
        lifetimes=LIFETIMES,
        problem=problem,
    )


def _list_path(shown_account: Account) -> str:
    return ACCESS_PATH if shown_account.kind is AccountKind.USER else ROBOTS_PATH


async def _disable(request: Request, caller: Caller, shown_account: Account, form: Query) -> Response:
    """Disables an account if the form confirms the change. Otherwise, asks for the confirmation."""
    if not is_confirmed(form):
        question = Question(
            title=translatable("Disable %(name)s?"),
            consequence=translatable(
                "Nobody can log in to the account any more, and its API tokens and sessions are refused, until it is "
                "enabled again."
            ),
            button=translatable("Disable"),
            name=shown_account.name,
            back=account_path(shown_account.name),
            section="access",
            fields={"do": "disable"},
        )
        return await ask(request, question)
    return await _set_enabled(caller, shown_account, False)


async def _enable(request: Request, caller: Caller, shown_account: Account, form: Query) -> Response:
    return await _set_enabled(caller, shown_account, True)


async def _set_enabled(caller: Caller, shown_account: Account, enabled: bool) -> Response:
    await caller.administration.set_enabled(shown_account.name, shown_account.kind, enabled, by=caller.actor)
    return redirect(account_path(shown_account.name))


async def _make_admin(request: Request, caller: Caller, shown_account: Account, form: Query) -> Response:
    """Makes a person an admin if the form confirms the change. Otherwise, asks for the confirmation."""
    if not is_confirmed(form):
        question = Question(
            title=translatable("Make %(name)s an admin?"),
            consequence=translatable("An admin may do everything, including changes of accounts and rights."),
            button=translatable("Make an admin"),
            name=shown_account.name,
            back=account_path(shown_account.name),
            section="access",
            fields={"do": "make-admin"},
        )
        return await ask(request, question)
    await caller.administration.set_admin(shown_account.name, True, by=caller.actor)
    return redirect(account_path(shown_account.name))


async def _unmake_admin(request: Request, caller: Caller, shown_account: Account, form: Query) -> Response:
    await caller.administration.set_admin(shown_account.name, False, by=caller.actor)
    return redirect(account_path(shown_account.name))


async def _set_password(request: Request, caller: Caller, shown_account: Account, form: Query) -> Response:
    """Sets the password of another person. If the form has no password, generates a password and shows it. Raises
    Denied if the account is the caller's own."""
    if caller.rights.name == shown_account.name:
        raise Denied('your own password can only be changed on the page "Your account"')
    # The empty text stands for the old password, which an admin does not need for another person's account.
    generated = await change_password(caller, shown_account.name, "", form.one("password") or None)
    if generated is None:
        return redirect(account_path(shown_account.name))
    return await show_password(request, shown_account.name, generated, account_path(shown_account.name))


async def _delete(request: Request, caller: Caller, shown_account: Account, form: Query) -> Response:
    """Removes an account if the form confirms the change. Otherwise, asks for the confirmation."""
    if not is_confirmed(form):
        question = Question(
            title=translatable("Delete the account %(name)s?"),
            consequence=translatable(
                "Its API tokens, sessions, memberships and grants are deleted, too. What it has pushed stays. This "
                "cannot be undone."
            ),
            button=translatable("Delete"),
            name=shown_account.name,
            back=account_path(shown_account.name),
            section="access",
            fields={"do": "delete"},
        )
        return await ask(request, question)
    await caller.administration.remove(shown_account.name, shown_account.kind, by=caller.actor)
    return redirect(_list_path(shown_account))


async def _add_token(request: Request, caller: Caller, shown_account: Account, form: Query) -> Response:
    return await add_token(request, caller, shown_account.name, form, account_path(shown_account.name))


async def _revoke_token(request: Request, caller: Caller, shown_account: Account, form: Query) -> Response:
    return await revoke_token(request, caller, form, account_path(shown_account.name))


async def _end_session(request: Request, caller: Caller, shown_account: Account, form: Query) -> Response:
    return await end_session(request, caller, form, account_path(shown_account.name))


async def _end_sessions(request: Request, caller: Caller, shown_account: Account, form: Query) -> Response:
    return await end_sessions(caller, shown_account.name, account_path(shown_account.name))


_CHANGES: Final[dict[str, Callable[[Request, Caller, Account, Query], Awaitable[Response]]]] = {
    "disable": _disable,
    "enable": _enable,
    "make-admin": _make_admin,
    "unmake-admin": _unmake_admin,
    "password": _set_password,
    "delete": _delete,
    "token": _add_token,
    "revoke": _revoke_token,
    "end-session": _end_session,
    "end-sessions": _end_sessions,
}
"""By the value of the form field `do`: the function that makes the change and returns the response."""

router.routes.extend(forms.routes)
