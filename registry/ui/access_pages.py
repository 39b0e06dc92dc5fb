"""The pages *Access*, for admins: lists of people, robots (accounts of programs), groups and API tokens. Forms on these
pages add people, robots and groups, and revoke API tokens.

Other modules have the pages of one account (`registry.ui.access_account_page`), of one group
(`registry.ui.access_group_page`) and of grants (`registry.ui.grant_pages`).
"""

from __future__ import annotations

import contextlib
from typing import Final
from urllib.parse import quote

from fastapi import APIRouter, Request, Response

from registry.admin.caller import Caller
from registry.http.query import Query
from registry.ui.credential_forms import revoke_token
from registry.ui.form_answers import FORM_ERRORS, FormProblem, field_text, problem_of, show_secret, unknown_change_error
from registry.ui.languages import translatable
from registry.ui.page_route import (
    FormRoute,
    PageRoute,
    admin_of,
    page_response,
    page_slot,
    query_of,
    receive_form,
    redirect,
    visit_of,
)
from storage.access import Account, AccountInvalid, AccountKind, AccountName, AccountUnknown
from storage.content import Page

ACCESS_PATH: Final = "/ui/access"
ROBOTS_PATH: Final = "/ui/access/robots"
GROUPS_PATH: Final = "/ui/access/groups"
TOKENS_PATH: Final = "/ui/access/tokens"
ACCOUNTS_PATH: Final = "/ui/access/accounts"
PAGE_SIZE: Final = 50
"""Largest number of entries on one page of a list."""
_LIST_PATHS: Final = {AccountKind.USER: ACCESS_PATH, AccountKind.ROBOT: ROBOTS_PATH}
_MAX_FILTER_CHARACTERS: Final = 64

router = APIRouter(route_class=PageRoute, include_in_schema=False)
forms = APIRouter(route_class=FormRoute, include_in_schema=False)
"""The routes of forms. A handler of a `FormRoute` must call `page_slot` before it renders a page: the slots limit how
many pages are rendered at a time."""


def account_path(name: str) -> str:
    """Returns the path of the page about an account."""
    return f"{ACCOUNTS_PATH}/{quote(name)}"


@router.get(ACCESS_PATH)
async def people(request: Request) -> Response:
    """Lists people. Optional query parameters: `q`, the text with which the listed names begin, and `after`, the last
    name on the previous page. Raises Unauthorized, Denied."""
    return await _accounts_page(request, AccountKind.USER)


@router.get(ROBOTS_PATH)
async def robots(request: Request) -> Response:
    """Lists robots. Has the same query parameters and errors as `people`."""
    return await _accounts_page(request, AccountKind.ROBOT)


@router.get(GROUPS_PATH)
async def groups(request: Request) -> Response:
    """Lists groups with the number of their members. Optional query parameter: `after`, the last name on the previous
    page. Raises Unauthorized, Denied."""
    return await _groups_page(request)


@router.get(TOKENS_PATH)
async def tokens(request: Request) -> Response:
    """Lists the API tokens of all accounts. Optional query parameter: `after`, the id of the last token on the previous
    page. Raises Unauthorized, Denied."""
    caller = await admin_of(request)
    page = caller.accounts.tokens(None, query_of(request).one("after") or None, PAGE_SIZE)
    return await page_response(
        request,
        "access_tokens.html",
        section="access",
        tokens=page.items,
        next_after=page.items[-1].id if page.more and page.items else None,
    )


@forms.post(ACCESS_PATH)
async def add_person(request: Request) -> Response:
    """Adds the account of a person. The first account becomes an admin. If the form has no password, generates one and
    shows it. If the form has a password, redirects to the page of the account, or to the login page if this is the
    first account. Raises Unauthorized, Denied."""
    caller, form = await receive_form(request, admin_of)
    # The registry is open as long as it has no account.
    password, is_first_account = form.one("password") or None, caller.is_registry_open
    try:
        added = await caller.administration.add_user(
            AccountName(field_text(form, "name")),
            password,
            admin=is_first_account or form.one("admin") == "yes",
            note=field_text(form, "note"),
            by=caller.actor,
        )
    except FORM_ERRORS as error:
        async with page_slot(request):
            return await _accounts_page(request, AccountKind.USER, problem_of(error), form)
    # Once the first account exists, the visitor has to log in with it.
    back = "/ui/login" if is_first_account else account_path(added.account.name)
    if added.password is None:
        return redirect(back)
    return await show_password(request, added.account.name, added.password, back)


@forms.post(ROBOTS_PATH)
async def add_robot(request: Request) -> Response:
    """Adds a robot, and redirects to the robot's page. Raises Unauthorized, Denied."""
    caller, form = await receive_form(request, admin_of)
    try:
        if caller.is_registry_open:
            raise AccountInvalid("the first account becomes an admin, so it cannot be a robot; add a person first")
        name, note = AccountName(field_text(form, "name")), field_text(form, "note")
        await caller.administration.add_robot(name, note=note, by=caller.actor)
    except FORM_ERRORS as error:
        async with page_slot(request):
            return await _accounts_page(request, AccountKind.ROBOT, problem_of(error), form)
    return redirect(account_path(name))


@forms.post(GROUPS_PATH)
async def add_group(request: Request) -> Response:
    """Adds a group without members, and redirects to the group's page. Raises Unauthorized, Denied."""
    caller, form = await receive_form(request, admin_of)
    try:
        name = AccountName(field_text(form, "name"))
        await caller.accounts.add_group(name, by=caller.actor)
    except FORM_ERRORS as error:
        async with page_slot(request):
            return await _groups_page(request, problem_of(error), form)
    return redirect(f"{GROUPS_PATH}/{quote(name)}")


@forms.post(TOKENS_PATH)
async def revoke_listed_token(request: Request) -> Response:
    """Revokes an API token. Raises Unauthorized, Denied, AccountUnknown."""
    caller, form = await receive_form(request, admin_of)
    if form.one("do") != "revoke":
        raise unknown_change_error()
    return await revoke_token(request, caller, form, TOKENS_PATH)


async def show_password(request: Request, name: AccountName, password: str, back: str) -> Response:
    """Returns a page that shows `password`, which was generated for the account `name`. `back`: the path of the page to
    which a link leads back."""
    return await show_secret(
        request,
        title=translatable("Password of %(name)s"),
        note=translatable("%(name)s logs in with it, and can change it."),
        name=name,
        secret=password,
        back=back,
        section="access",
    )


async def _accounts_page(
    request: Request, kind: AccountKind, problem: FormProblem | None = None, form: Query | None = None
) -> Response:
    caller, query = await admin_of(request), query_of(request)
    prefix = (query.one("q") or "").strip().lower()[:_MAX_FILTER_CHARACTERS]
    page = _matching_accounts(caller, kind, prefix, query.one("after") or None)
    return await page_response(
        request,
        "access_accounts.html",
        status_code=200 if problem is None else problem.status,
        section="access",
        # `here`: the path to which the browser returns when the visitor chooses another language.
        here=visit_of(request).path if problem is None else _LIST_PATHS[kind],
        kind=kind.value,
        path=_LIST_PATHS[kind],
        prefix=prefix,
        accounts=page.items,
        next_after=page.items[-1].name if page.more and page.items else None,
        is_first_page=query.one("after") is None,
        problem=problem,
        entered=_entered(form),
    )


def _matching_accounts(caller: Caller, kind: AccountKind, prefix: str, after: str | None) -> Page[Account]:
    """Returns a page of the accounts of one kind whose names begin with `prefix`. If `after` is not None, the page
    begins after this name."""
    exact_match: list[Account] = []
    if prefix and after is None:
        # The list below has only names after `prefix`, so it lacks the account whose name is `prefix`.
        with contextlib.suppress(AccountInvalid, AccountUnknown):
            exact_match = [caller.administration.find_account(AccountName(prefix), kind)]
        after = prefix
    page = caller.accounts.accounts(kind, after, PAGE_SIZE - len(exact_match))
    matching = [account for account in page.items if account.name.startswith(prefix)]
    return Page(exact_match + matching, more=page.more and len(matching) == len(page.items))


async def _groups_page(request: Request, problem: FormProblem | None = None, form: Query | None = None) -> Response:
    caller = await admin_of(request)
    page = caller.accounts.groups(query_of(request).one("after") or None, PAGE_SIZE)
    return await page_response(
        request,
        "access_groups.html",
        status_code=200 if problem is None else problem.status,
        section="access",
        here=visit_of(request).path if problem is None else GROUPS_PATH,  # as in `_accounts_page`
        groups=[(name, len(members)) for name, members in page.items],
        next_after=page.items[-1][0] if page.more and page.items else None,
        problem=problem,
        entered=_entered(form),
    )


def _entered(form: Query | None) -> dict[str, str]:
    """Returns what the visitor has entered into the fields of `form`, except the password, so that the page can show it
    again after an error. If `form` is None, all values are empty."""
    names = ("name", "note", "admin")
    return {name: "" if form is None else field_text(form, name) for name in names}


router.routes.extend(forms.routes)
