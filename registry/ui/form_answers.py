"""The pages that the server sends in response to a form, if it does not send a redirect. They show a question before a
change that cannot be undone, a secret that is shown once, or what was wrong with the form."""

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
"""Translated texts for errors. The first two replace the message of the error; the others are shown with it."""


@dataclass(frozen=True, slots=True)
class FormProblem:
    """Says why a form was refused. `status`: the status of the response. `text`: a text that the pages translate, or
    an empty text. `message`: the message of the error, in English; empty if `text` says everything."""

    status: int
    text: str
    message: str = ""


def problem_of(error: RegistryError) -> FormProblem:
    """Returns the explanation of an error in `FORM_ERRORS` for the page."""
    if isinstance(error, AccountExists | LastAdmin):
        return FormProblem(status_of(error), _PROBLEM_TEXTS[type(error)])
    return FormProblem(status_of(error), _PROBLEM_TEXTS.get(type(error), ""), error.message)


def text_of(form: Query, name: str) -> str:
    """Returns a field of a form without the white space around it; empty if the form does not have the field. Raises
    RequestInvalid if it has several."""
    return (form.one(name) or "").strip()


@dataclass(frozen=True, slots=True)
class Question:
    """A question that a visitor has to confirm before the server makes the change.

    - `title`, `consequence` and `button` are translated on the page. The first two show `name` in place of `%(name)s`.
    - `fields`: the fields of the form, which the confirmation sends again.
    - `back`: the path of the page with the form. `section`: the entry of the navigation that is marked as current."""

    title: str
    consequence: str
    button: str
    name: str
    back: str
    section: str
    fields: Mapping[str, str] = field(default_factory=dict)


def is_confirmed(form: Query) -> bool:
    """Returns whether the form comes from the page that asks for confirmation."""
    return form.one(_CONFIRMED) == "yes"


async def ask(request: Request, question: Question) -> Response:
    """Returns the page that asks a question. Its form is sent to the path of this request."""
    async with page_slot(request):
        return await page_response(
            request,
            "confirm.html",
            section=question.section,
            # The page to which a change of the language leads. It is the page with the form, because opening this
            # question again would not send the form again.
            here=question.back,
            question=question,
            fields={**question.fields, _CONFIRMED: "yes"},
            path=request.url.path,
        )


async def show_secret(
    request: Request, *, title: str, note: str, name: str, secret: str, back: str, section: str
) -> Response:
    """Returns the page with a secret that is shown once. `title` and `note` are translated on the page, and show `name`
    in place of `%(name)s`."""
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
