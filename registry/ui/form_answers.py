"""Pages that the server sends in response to a form, in place of a redirect. Such a page asks the visitor to confirm a
change that cannot be undone (`ask`), shows a secret once (`show_secret`), or explains why the server has refused the
form (`FormProblem`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from fastapi import Request, Response

from registry.http.error_statuses import status_of
from registry.http.query import Query
from registry.request import RequestInvalid
from registry.ui.languages import translatable
from registry.ui.page_route import page_response, page_slot
from storage.access import AccountExists, AccountHidden, AccountInvalid, AccountUnknown, LastAdmin
from storage.errors import NameInvalid, NameUnknown, RegistryError

FORM_ERRORS: Final = (AccountInvalid, AccountUnknown, AccountExists, LastAdmin, NameInvalid, NameUnknown)
"""Errors that the visitor can correct in the form."""
_CONFIRMED: Final = "confirmed"
_UNKNOWN_TEXT: Final = translatable("It does not exist any more, or never did.")
_PROBLEM_TEXTS: Final[Mapping[type[RegistryError], str]] = {
    AccountExists: translatable("This name is taken."),
    LastAdmin: translatable("This is the last admin who is enabled. Make another account an admin first."),
    AccountUnknown: _UNKNOWN_TEXT,
    AccountHidden: _UNKNOWN_TEXT,
}
"""Explanations of errors. The page translates them. For AccountExists and LastAdmin, the page shows only the
explanation. For the other errors, it shows the explanation and the message of the error."""


@dataclass(frozen=True, slots=True)
class FormProblem:
    """Why the server has refused a form.

    - `status`: the HTTP status of the response.
    - `text`: an explanation, which the page translates; empty if the page shows only `message`.
    - `message`: the message of the error, in English; empty if the page shows only `text`."""

    status: int
    text: str
    message: str = ""


def problem_of(error: RegistryError) -> FormProblem:
    """Returns what the page shows for an error of one of the types in `FORM_ERRORS`."""
    if isinstance(error, AccountExists | LastAdmin):
        return FormProblem(status_of(error), _PROBLEM_TEXTS[type(error)])
    return FormProblem(status_of(error), _PROBLEM_TEXTS.get(type(error), ""), error.message)


def field_text(form: Query, name: str) -> str:
    """Returns the text of the form's field `name`, without white space at both ends. If the form does not have the
    field, returns an empty text. Raises RequestInvalid if the form has the field more than once."""
    return (form.one(name) or "").strip()


@dataclass(frozen=True, slots=True)
class Question:
    """A question that a visitor has to confirm before the server makes a change. A form has requested the change.

    - `title`, `consequence` and `button`: texts, which the page translates. In `title` and `consequence`, the page
      replaces `%(name)s` by `name`, the name of what changes.
    - `back`: the path of the page with the form.
    - `section`: the entry of the navigation that the page marks as current.
    - `fields`: the fields of the form. The browser sends them again with the confirmation."""

    title: str
    consequence: str
    button: str
    name: str
    back: str
    section: str
    fields: Mapping[str, str] = field(default_factory=dict)


def is_confirmed(form: Query) -> bool:
    """Returns whether the visitor has sent `form` to confirm a question of `ask`."""
    return form.one(_CONFIRMED) == "yes"


async def ask(request: Request, question: Question) -> Response:
    """Returns the page that asks a question. The browser sends the confirmation to the path of `request`."""
    async with page_slot(request):
        return await page_response(
            request,
            "confirm.html",
            section=question.section,
            # After a change of the language, the browser loads the page with the form. It cannot load the question,
            # which exists only as the response to a form.
            here=question.back,
            question=question,
            fields={**question.fields, _CONFIRMED: "yes"},
            path=request.url.path,
        )


async def show_secret(
    request: Request, *, title: str, note: str, name: str, secret: str, back: str, section: str
) -> Response:
    """Returns the page that shows `secret` once. `title` and `note`: texts that the page translates; it replaces
    `%(name)s` in them by `name`. `back` and `section`: see `Question`."""
    async with page_slot(request):
        return await page_response(
            request,
            "secret.html",
            section=section,
            here=back,
            title=title,
            note=note,
            name=name,
            secret=secret,
            back=back,
        )


def unknown_change_error() -> RequestInvalid:
    """Returns the error for a form that names no known change."""
    return RequestInvalid("the form does not say what to do")
