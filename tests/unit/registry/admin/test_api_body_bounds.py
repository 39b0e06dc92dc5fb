"""Tests that no JSON body makes the management API create many error objects, send a long response, or keep the body in
memory after the response has begun."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from fastapi import FastAPI, Request
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError

from registry.admin.body_limits import MAX_LARGE_BODY_BYTES, BoundedRequest
from registry.admin.body_model import MAX_UNKNOWN_FIELDS, BodyModel
from registry.admin.management_api import management_routes
from registry.admin.middleware import MAX_LISTED_ERRORS, add_error_handlers
from registry.admin.repository_routes import ExpectedTagsToRemove
from storage.tag_removal import MAX_REMOVED_TAGS

MAX_ERRORS = MAX_REMOVED_TAGS * 2
"""The most errors that a body may cause: one for each key and each value of the field `digests` of
`ExpectedTagsToRemove`, which is the largest object whose keys are not the fields of a model."""
MANY = 30_000
MARK = "mark-of-the-body"
"""A name of a field by which a test finds an object in memory."""


def body_models() -> dict[str, type[BaseModel]]:
    """Returns the models of all bodies by the name of the route."""
    routes = [route for route in management_routes() if isinstance(route, APIRoute)]
    annotations: dict[str, Any] = {
        route.name: route.body_field.field_info.annotation for route in routes if route.body_field
    }
    # If the body is optional, the annotation is a union of the model and None.
    return {name: (get_args(model) or [model])[0] for name, model in annotations.items()}


MODELS = body_models()


def hostile_bodies(model: type[BaseModel]) -> Iterator[Any]:
    """Yields bodies with many mistakes: unknown fields, and in each field long lists and objects of wrong values."""
    unknown = {str(number): 1 for number in range(MANY)}
    values: list[Any] = [
        unknown,
        [0] * MANY,
        [[]] * MANY,
        [{}] * MANY,
        [unknown],
        [{str(number): 1 for number in range(MAX_UNKNOWN_FIELDS)}] * MANY,
        {"a": unknown},
    ]
    yield unknown
    yield from values
    for name, field in model.model_fields.items():
        yield from ({field.alias or name: value} for value in values)


def test_routes_with_bodies_are_found() -> None:
    """The routes of the API with a body are known, and each has a model with the limits of `BodyModel`."""
    assert len(MODELS) > 20
    assert [name for name, model in MODELS.items() if not issubclass(model, BodyModel)] == []


@pytest.mark.parametrize("name", MODELS)
def test_no_body_causes_many_errors(name: str) -> None:
    """A body that is wrong in very many places causes only a few errors."""
    for body in hostile_bodies(MODELS[name]):
        with pytest.raises(ValidationError) as caught:
            MODELS[name].model_validate(body)
        assert caught.value.error_count() <= MAX_ERRORS, str(body)[:100]


def test_few_unknown_fields_are_each_reported() -> None:
    """Each of a few unknown fields has an error of its own, which names the field."""
    with pytest.raises(ValidationError) as caught:
        ExpectedTagsToRemove.model_validate({"tags": ["a"], "tgas": 1, "digest": 2})
    assert [error["loc"] for error in caught.value.errors()] == [("tgas",), ("digest",)]


async def answer_to(body: bytes) -> tuple[int, bytes, bool]:
    """Sends a body to a route that removes tags. Returns the status and the body of the response, and whether objects
    of the request's body are still in memory while the response is sent."""
    app = FastAPI()
    add_error_handlers(app)

    class Route(APIRoute):
        def get_route_handler(self) -> Any:
            run_handler = super().get_route_handler()

            async def handle(request: Request) -> Any:
                return await run_handler(BoundedRequest(request, MAX_LARGE_BODY_BYTES))

            return handle

    app.router.route_class = Route

    @app.post("/")
    async def remove(body: ExpectedTagsToRemove) -> None:
        return None

    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    scope = {"type": "http", "method": "POST", "path": "/", "raw_path": b"/", "query_string": b"", "headers": headers}
    messages = [{"type": "http.request", "body": body, "more_body": False}]
    status, data, is_in_memory = 0, b"", False

    async def receive() -> Any:
        return messages.pop()

    async def send(message: Any) -> None:
        nonlocal status, data, is_in_memory
        status = message.get("status", status)
        if message["type"] == "http.response.body":
            data += message["body"]
            is_in_memory = any(type(item) is dict and MARK in item for item in gc.get_objects())

    await app({**scope, "asgi": {"version": "3.0"}, "http_version": "1.1", "server": None}, receive, send)
    return status, data, is_in_memory


def marked() -> dict[str, list[int]]:
    """Returns an object to put into a body. Python's garbage collector tracks the object because it holds a list."""
    return {MARK: [1]}


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (json.dumps({"tags": [marked()] * 5}), 422),
        (json.dumps({"tags": ["a"], **marked()}), 422),
        (json.dumps({"tags": ["a"], "digests": {f"{number}": marked() for number in range(200)}}), 422),
        (json.dumps({"tags": ["a"], **marked(), **{f"\u00e9{number}" * 200: 1 for number in range(20)}}), 422),
        (json.dumps({"tags": ["a"], **marked(), "\u00e9" * 100_000: 1}), 422),
        (json.dumps({str(number): marked() for number in range(5000)}), 422),
        (json.dumps({str(number): 1 for number in range(40_000)}), 413),
        (json.dumps({"tags": [marked()]}) + "x", 422),
        (json.dumps({"tags": [marked()]})[:-1] + ',"a":' + "9" * 5000 + "}", 413),
        (json.dumps({"tags": [marked()]})[:-1] + ',"a":' + "[" * 50_000, 413),
        (json.dumps({"tags": [marked()]})[:-1] + ',"a":' + "[" * 10_000, 400),
    ],
    ids=range(11),
)
@pytest.mark.slow
async def test_error_response_is_short_and_releases_the_body(body: str, status: int) -> None:
    """The response to an invalid body is short, and nothing of the body is in memory while the response is sent."""
    answer = await answer_to(body.encode())
    assert answer[0] == status, answer
    assert len(answer[1]) < 32 * 1024
    assert not answer[2]
    (error,) = json.loads(answer[1])["errors"]
    assert len(error.get("detail", [])) <= MAX_LISTED_ERRORS
