"""Tests that no number, time or text in a parameter or a body of the management API causes an internal error."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, urlencode

import httpx2
import pytest

from tests.fakes.admin_site import ADMIN, PASSWORD, AdminSite
from tests.fakes.api_document import api_document
from tests.fakes.commands import entrepot_output
from tests.fakes.plain_client import plain_client
from tests.fakes.server_process import running_server
from tests.system.admin.test_api_refusals import BODIES, ROUTES

EXTREME_TEXTS = (
    *("-1", "9" * 18, "9" * 19, "9" * 30, "-" + "9" * 20, "9" * 5000, "1e400", "nan", "²", "٣", "9" * 18 + "d"),
    *("0001-01-01T00:00:00", "0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59", "a\0b", "\x1b", "\ud800"),
    *("\ue000", "\uffff", "\U0010ffff"),
)
"""Texts for parameters, and for fields of bodies: large and negative numbers, times outside of the years that a file
system or a database has, digits that are not ASCII, control characters, and characters beside the surrogates or at the
end of Unicode."""
EXTREME_VALUES = (10**18, 10**19, 10**30, -(10**20), 1e308, float("inf"))
"""Numbers for fields of bodies."""
DOCUMENT = api_document()


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx2.Client]:
    """Yields a client of a separate server, because some of the requests start jobs or change accounts."""
    folder: Path = tmp_path_factory.mktemp("extreme")
    entrepot_output("user", "add", ADMIN, "--admin", "--password-file", "-", folder=folder, stdin_text=PASSWORD)
    with running_server(folder, workers=1) as server:
        site = AdminSite(server, folder)
        token = site.token(ADMIN)
        headers = {"authorization": f"Bearer {token}"}
        with plain_client(f"{server.url}/api/v1", headers=headers, timeout=60) as api_client:
            yield api_client


def targets_of(method: str, path: str) -> Iterator[str]:
    """Yields the targets of requests to a route, in each of which one parameter has an extreme value."""
    operation = DOCUMENT["paths"][f"/api/v1{path}"][method.lower()]
    parameters = operation.get("parameters", ())
    usual = {each["name"]: b"root" for each in parameters if each["required"]}
    in_query = {each["name"] for each in parameters if each["in"] == "query"}
    for parameter in parameters:
        for text in EXTREME_TEXTS:
            values = {**usual, parameter["name"]: text.encode("utf-8", "surrogatepass")}
            target = path.format_map({name: quote(value, safe="") for name, value in values.items()})
            yield f"{target}?{urlencode({name: values[name] for name in in_query & values.keys()})}"


def bodies_of(method: str, path: str) -> Iterator[bytes]:
    """Yields bodies for a route, in each of which one field has an extreme value."""
    usual = BODIES.get((method, path), {})
    content = DOCUMENT["paths"][f"/api/v1{path}"][method.lower()].get("requestBody", {}).get("content", {})
    schema = content.get("application/json", {}).get("schema", {})
    reference = schema.get("$ref") or next((each["$ref"] for each in schema.get("anyOf", ()) if "$ref" in each), None)
    if reference is not None:
        for name in DOCUMENT["components"]["schemas"][reference.rpartition("/")[2]]["properties"]:
            for value in (*EXTREME_TEXTS, *EXTREME_VALUES):
                yield json.dumps({**usual, name: value}).encode()
                if isinstance(value, str):
                    yield json.dumps({**usual, name: [value]}).encode()


@pytest.mark.parametrize("route", ROUTES, ids=" ".join)
def test_extreme_values_cause_no_internal_error(client: httpx2.Client, route: tuple[str, str]) -> None:
    """Whatever a parameter or a field contains, the status is not 500."""
    method, path = route
    headers = {"content-type": "application/json"}
    usual = re.sub(r"\{\w+\}", "root", path)
    requests = [
        (target, json.dumps(BODIES[route]).encode() if route in BODIES else b"") for target in targets_of(*route)
    ]
    requests += [(usual, body) for body in bodies_of(*route)]
    for target, body in requests:
        with client.stream(method, target, content=body, headers=headers) as answer:
            assert answer.status_code < 500, (target, body[:200])
