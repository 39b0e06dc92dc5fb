"""The page about one group, for admins: its members and its grants (rights on repositories), and the forms that change
them."""

from __future__ import annotations

from typing import Final
from urllib.parse import quote

from fastapi import APIRouter, Request, Response

from registry.admin.caller import Caller
from registry.http.query import Query
from registry.ui.access_pages import GROUPS_PATH
from registry.ui.credential_forms import MAX_SHOWN_ROWS
from registry.ui.form_answers import (
    FORM_ERRORS,
    FormProblem,
    Question,
    ask,
    is_confirmed,
    problem_of,
    text_of,
    unknown_change,
)
from registry.ui.languages import translatable
from registry.ui.page_route import FormRoute, PageRoute, admin_of, page_response, page_slot, receive_form, redirect
from storage.access import AccountName, Grantee, GranteeKind

SHOWN_MEMBERS: Final = 1000
"""How many members of a group its page shows."""

router = APIRouter(route_class=PageRoute, include_in_schema=False)
forms = APIRouter(route_class=FormRoute, include_in_schema=False)
"""The routes of forms. A *slot* is the permit to render a page. A `FormRoute` holds none while its handler runs, so a
handler that renders a page acquires one (`page_slot`)."""


@router.get(f"{GROUPS_PATH}/{{name}}")
async def group(request: Request, name: str) -> Response:
    """Shows a group. Raises Unauthorized, Denied, AccountInvalid, AccountUnknown."""
    return await _group_page(request, await admin_of(request), AccountName(name))


@forms.post(f"{GROUPS_PATH}/{{name}}")
async def change_group(request: Request, name: str) -> Response:
    """Adds or removes the member that the form names, or deletes the group: the field `do` says which. Shows the page
    again with the reason if the change was not possible. Raises Unauthorized, Denied, AccountInvalid,
    AccountUnknown."""
    caller, form = await receive_form(request, admin_of)
    group_name, _members = caller.administration.group(AccountName(name))
    try:
        return await _change(request, caller, group_name, form)
    except FORM_ERRORS as error:
        async with page_slot(request):
            return await _group_page(request, caller, group_name, problem_of(error), text_of(form, "member"))


async def _change(request: Request, caller: Caller, name: AccountName, form: Query) -> Response:
    change, path = form.one("do"), _path(name)
    if change == "join":
        await caller.accounts.add_member(name, AccountName(text_of(form, "member")), by=caller.actor)
        return redirect(path)
    if change == "leave":
        await caller.accounts.remove_member(name, AccountName(text_of(form, "member")), by=caller.actor)
        return redirect(path)
    if change != "delete":
        raise unknown_change()
    if not is_confirmed(form):
        question = Question(
            title=translatable("Delete the group %(name)s?"),
            consequence=translatable(
                "The grants to the group are deleted too. The accounts of its members stay. This cannot be undone."
            ),
            button=translatable("Delete"),
            name=name,
            back=path,
            section="access",
            fields={"do": "delete"},
        )
        return await ask(request, question)
    await caller.accounts.remove_group(name, by=caller.actor)
    return redirect(GROUPS_PATH)


async def _group_page(
    request: Request, caller: Caller, name: AccountName, problem: FormProblem | None = None, entered: str = ""
) -> Response:
    _name, members = caller.administration.group(name)
    grants = caller.accounts.grant_page([Grantee(GranteeKind.GROUP, name)], None, MAX_SHOWN_ROWS)
    return await page_response(
        request,
        "access_group.html",
        status_code=200 if problem is None else problem.status,
        section="access",
        here=_path(name),
        name=name,
        members=members[:SHOWN_MEMBERS],
        hidden_members=max(0, len(members) - SHOWN_MEMBERS),
        grants=grants.items,
        has_more_grants=grants.more,
        problem=problem,
        entered=entered,
    )


def _path(name: str) -> str:
    return f"{GROUPS_PATH}/{quote(name)}"


router.routes.extend(forms.routes)
