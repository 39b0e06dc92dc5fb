"""Responses to forms that are pages and not redirects. A page asks a question before a change that cannot be undone,
shows a secret once, or says what was wrong with the form."""

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
"""Texts for errors, which the page translates. The texts of AccountExists and LastAdmin replace the message of the
error. The others are shown together with the message."""


@dataclass(frozen=True, slots=True)
class FormProblem:
    """Says why a form was refused. `status`: the status of the response. `text`: an explanation, which the page
    translates; empty if there is only the message. `message`: the message of the error, in English; empty if `text`
    says everything."""

    status: int
    text: str
    message: str = ""


def problem_of(error: RegistryError) -> FormProblem:
    """Returns what the page says about an error. The error is one of `FORM_ERRORS`."""
    if isinstance(error, AccountExists | LastAdmin):
        return FormProblem(status_of(error), _PROBLEM_TEXTS[type(error)])
    return FormProblem(status_of(error), _PROBLEM_TEXTS.get(type(error), ""), error.message)


def text_of(form: Query, name: str) -> str:
    """Returns the text of a form's field, without the white space around it. The text is empty if the form does not
    have the field. Raises RequestInvalid if the form has the field more than once."""
    return (form.one(name) or "").strip()


@dataclass(frozen=True, slots=True)
class Question:
    """A question that a visitor has to confirm before the server makes a change.

    - `title`, `consequence` and `button`: texts that the page translates. In `title` and `consequence`, the page
      replaces `%(name)s` by `name`.
    - `fields`: the fields of the form that asked for the change. The confirmation sends them again.
    - `back`: the path of the page with that form. `section`: the entry of the navigation that is marked as current."""

    title: str
    consequence: str
    button: str
    name: str
    back: str
    section: str
    fields: Mapping[str, str] = field(default_factory=dict)


def is_confirmed(form: Query) -> bool:
    """Returns whether the visitor has confirmed the question of `ask`."""
    return form.one(_CONFIRMED) == "yes"


async def ask(request: Request, question: Question) -> Response:
    """Returns the page that asks a question. The browser sends the confirmation to the path of `request`."""
    async with page_slot(request):
        return await page_response(
            request,
            "confirm.html",
            section=question.section,
            # The path that the browser loads after the visitor has changed the language: that of the page with the
            # form. The server shows this question only in response to a form.
            here=question.back,
            question=question,
            fields={**question.fields, _CONFIRMED: "yes"},
            path=request.url.path,
        )


async def show_secret(
    request: Request, *, title: str, note: str, name: str, secret: str, back: str, section: str
) -> Response:
    """Returns the page with a secret that is shown once. The page translates `title` and `note`, and replaces
    `%(name)s` in both by `name`. `back` and `section`: see `Question`."""
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


def unknown_change() -> RequestInvalid:
    """Returns the error about a form that does not say what to do."""
    return RequestInvalid("the form does not say what to do")
