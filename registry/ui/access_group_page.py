"""The page on which admins see one group, its members, and its grants (rights on repositories). The forms of the page
add and remove members, and delete the group."""

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
    field_text,
    is_confirmed,
    problem_of,
    unknown_change_error,
)
from registry.ui.languages import translatable
from registry.ui.page_route import FormRoute, PageRoute, admin_of, page_response, page_slot, receive_form, redirect
from storage.access import AccountName, Grantee, GranteeKind

MAX_SHOWN_MEMBERS: Final = 1000
"""Largest number of members that the page of a group shows."""

router = APIRouter(route_class=PageRoute, include_in_schema=False)
forms = APIRouter(route_class=FormRoute, include_in_schema=False)
"""The routes that receive forms. A handler of a `FormRoute` must acquire a *slot*, the permit to render a page, before
it renders one (`page_slot`)."""


@router.get(f"{GROUPS_PATH}/{{name}}")
async def group(request: Request, name: str) -> Response:
    """Shows a group. Raises Unauthorized, Denied, AccountInvalid, AccountUnknown."""
    return await _group_page(request, await admin_of(request), AccountName(name))


@forms.post(f"{GROUPS_PATH}/{{name}}")
async def change_group(request: Request, name: str) -> Response:
    """Makes the change that the field `do` of the form names: adds or removes a member, or deletes the group. If the
    change is not possible, shows the page with the reason. Raises Unauthorized, Denied, AccountInvalid,
    AccountUnknown."""
    caller, form = await receive_form(request, admin_of)
    group_name, _members = caller.administration.group(AccountName(name))
    try:
        return await _change(request, caller, group_name, form)
    except FORM_ERRORS as error:
        async with page_slot(request):
            return await _group_page(request, caller, group_name, problem_of(error), field_text(form, "member"))


async def _change(request: Request, caller: Caller, name: AccountName, form: Query) -> Response:
    change, path = form.one("do"), _path(name)
    if change == "join":
        await caller.accounts.add_member(name, AccountName(field_text(form, "member")), by=caller.actor)
        return redirect(path)
    if change == "leave":
        await caller.accounts.remove_member(name, AccountName(field_text(form, "member")), by=caller.actor)
        return redirect(path)
    if change != "delete":
        raise unknown_change_error()
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
        members=members[:MAX_SHOWN_MEMBERS],
        hidden_members=max(0, len(members) - MAX_SHOWN_MEMBERS),
        grants=grants.items,
        has_more_grants=grants.more,
        problem=problem,
        entered=entered,
    )


def _path(name: str) -> str:
    return f"{GROUPS_PATH}/{quote(name)}"


router.routes.extend(forms.routes)
