"""The pages *Grants* and *What may … do?*, for admins. A grant gives its *subject* (an account, a group, every account
or everyone) rights on repositories. The first page lists grants and has forms that change them. The second page shows
which rights an account has."""

from __future__ import annotations

from typing import Final

from fastapi import APIRouter, Request, Response

from registry.admin.caller import Caller
from registry.admin.rights_routes import ANONYMOUS_NAME, require_visible_account
from registry.auth.administration import parse_actions, parse_pattern
from registry.auth.rights.explanation import RightsExplanation, explain_rights
from registry.http.query import Query
from registry.ui.access_pages import PAGE_SIZE
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
from storage.access import EVERY_ACTION, Grant, Grantee, GranteeKind
from storage.names import RepositoryName

GRANTS_PATH: Final = "/ui/access/grants"
RIGHTS_PATH: Final = "/ui/access/rights"
SUBJECT_LABELS: Final = {
    GranteeKind.USER.value: translatable("Person"),
    GranteeKind.ROBOT.value: translatable("Robot"),
    GranteeKind.GROUP.value: translatable("Group"),
    GranteeKind.AUTHENTICATED.value: translatable("Every account"),
    GranteeKind.EVERYONE.value: translatable("Everyone, also without a login"),
}
"""The label on the page for each kind of subject."""
router = APIRouter(route_class=PageRoute, include_in_schema=False)
forms = APIRouter(route_class=FormRoute, include_in_schema=False)
"""The routes that receive forms. Their handlers start without a *slot*, the permit to render a page. A handler that
renders a page must first acquire a slot (`page_slot`)."""


@router.get(GRANTS_PATH)
async def show_grants(request: Request) -> Response:
    """Lists grants. The query can have two parameters:

    - `subject`, such as `group:dev`: lists only the grants of this subject.
    - `after`: the subject and pattern of the last grant on the previous page.

    Raises Unauthorized, Denied, AccountInvalid."""
    return await _grants_page(request, await admin_of(request))


@forms.post(GRANTS_PATH)
async def change_grants(request: Request) -> Response:
    """Adds or removes the grant that the form describes. The field `do` is `put` or `remove`. Asks for a confirmation
    before it removes the grant. If the change fails, shows the page again with the reason. Raises Unauthorized, Denied,
    RequestInvalid."""
    caller, form = await receive_form(request, admin_of)
    try:
        if form.one("do") == "put":
            return await _put_grant(caller, form)
        if form.one("do") == "remove":
            return await _remove_grant(request, caller, form)
    except FORM_ERRORS as error:
        async with page_slot(request):
            return await _grants_page(request, caller, problem_of(error), form)
    raise unknown_change_error()


async def _put_grant(caller: Caller, form: Query) -> Response:
    kind, name = field_text(form, "kind"), field_text(form, "name")
    subject = Grantee.parse(kind if kind in (GranteeKind.AUTHENTICATED, GranteeKind.EVERYONE) else f"{kind}:{name}")
    pattern = parse_pattern(field_text(form, "pattern"))
    grant = Grant(subject, pattern, parse_actions(",".join(form.all("action"))))
    await caller.administration.put_grants([grant], by=caller.actor)
    return redirect(GRANTS_PATH)


async def _remove_grant(request: Request, caller: Caller, form: Query) -> Response:
    subject, pattern = Grantee.parse(field_text(form, "subject")), parse_pattern(field_text(form, "pattern"))
    if not is_confirmed(form):
        question = Question(
            title=translatable("Remove the grant %(name)s?"),
            consequence=translatable("Whoever has rights by this grant alone loses them at once."),
            button=translatable("Remove"),
            name=f"{subject} {pattern}",
            back=GRANTS_PATH,
            section="access",
            fields={"do": "remove", "subject": str(subject), "pattern": pattern},
        )
        return await ask(request, question)
    await caller.administration.remove_grant(subject, pattern, by=caller.actor)
    return redirect(GRANTS_PATH)


async def _grants_page(
    request: Request, caller: Caller, problem: FormProblem | None = None, form: Query | None = None
) -> Response:
    query = query_of(request)
    subject = (query.one("subject") or "").strip()
    subjects = [Grantee.parse(subject)] if subject else None
    page = caller.accounts.grant_page(subjects, query.one("after") or None, PAGE_SIZE)
    last_grant = page.items[-1] if page.more and page.items else None
    return await page_response(
        request,
        "access_grants.html",
        status_code=200 if problem is None else problem.status,
        section="access",
        # `here`: the path to which the browser returns when the visitor chooses another language. After a form that
        # failed, this is the list without a query.
        here=visit_of(request).path if problem is None else GRANTS_PATH,
        grants=page.items,
        next_after=None if last_grant is None else f"{last_grant.subject} {last_grant.pattern}",
        subject=subject,
        kinds=SUBJECT_LABELS,
        every_action=EVERY_ACTION.words,
        problem=problem,
        entered={name: "" if form is None else field_text(form, name) for name in ("kind", "name", "pattern")},
        entered_actions=[] if form is None else form.all("action"),
    )


@router.get(RIGHTS_PATH)
async def show_rights(request: Request) -> Response:
    """Shows what an account may do on a repository, and which grants allow these actions. The query can have two
    parameters:

    - `repository`: the name of the repository. Without it, shows only the form.
    - `account`: the name of the account. Without it, shows what a client without a login may do.

    Raises Unauthorized, Denied."""
    caller, query = await admin_of(request), query_of(request)
    account, repository = (query.one("account") or "").strip().lower(), (query.one("repository") or "").strip()
    explanation: RightsExplanation | None = None
    problem: FormProblem | None = None
    if repository:
        try:
            name = require_visible_account(caller, account or ANONYMOUS_NAME)
            explanation = await explain_rights(request.app.service.access.policy, name, RepositoryName(repository))
        except FORM_ERRORS as error:
            problem = problem_of(error)
    return await page_response(
        request,
        "access_rights.html",
        status_code=200 if problem is None else problem.status,
        section="access",
        asked={"account": account, "repository": repository},
        found=explanation,
        problem=problem,
        every_action=EVERY_ACTION.words,
    )


router.routes.extend(forms.routes)
