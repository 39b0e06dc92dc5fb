"""Tests of the documentation of the management API: the page `/api/docs` and the OpenAPI document."""

from __future__ import annotations

import json
import re

import pytest

from tests.fakes.admin_site import AdminSite
from tests.fakes.api_document import api_document
from tests.fakes.plain_client import plain_request


def test_the_page_needs_no_internet(site: AdminSite) -> None:
    """The page loads its scripts, styles and icon from this registry, and its content security policy allows no other
    source."""
    page = plain_request("GET", f"{site.server.url}/api/docs")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "script-src 'self';" in page.headers["content-security-policy"]
    assert "default-src 'none'" in page.headers["content-security-policy"]
    links = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(links) == 5
    for link in links:
        answer = plain_request("GET", f"{site.server.url}{link}")
        assert answer.status_code == 200, link
        assert link == "/api/openapi.json" or answer.headers["x-content-type-options"] == "nosniff"
    assert "http" not in page.text
    assert not re.search(r"<script>|<style>| on[a-z]+=", page.text)


@pytest.mark.parametrize(
    ("name", "kind", "part"),
    [
        ("swagger-ui-bundle.js", "text/javascript; charset=utf-8", b"SwaggerUIBundle"),
        ("swagger-ui.css", "text/css; charset=utf-8", b".swagger-ui"),
        ("favicon-32x32.png", "image/png", b"PNG"),
        ("start.js", "text/javascript; charset=utf-8", b'url: "/api/openapi.json"'),
    ],
)
def test_files_of_swagger_ui(site: AdminSite, name: str, kind: str, part: bytes) -> None:
    """The server serves the files of Swagger UI, and the script that starts it."""
    answer = plain_request("GET", f"{site.server.url}/api/docs/{name}")
    assert (answer.status_code, answer.headers["content-type"]) == (200, kind)
    assert part in answer.content


@pytest.mark.parametrize("name", ["none.js", "__init__.py", "..%2fmain.py", "%2fetc%2fpasswd"])
def test_no_other_files(site: AdminSite, name: str) -> None:
    """The server serves no other file of the package or of the machine."""
    assert plain_request("GET", f"{site.server.url}/api/docs/{name}").status_code == 404


def test_every_route_is_described() -> None:
    """In the OpenAPI document, each route has a summary, a description, a tag that is described, and its authentication
    schemes."""
    document = api_document()
    tags = {tag["name"] for tag in document["tags"]}
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            assert route["summary"], (method, path)
            assert route["description"], (method, path)
            assert set(route["tags"]) <= tags, (method, path)
            if path.startswith("/api/v1"):
                assert route["security"] == [{"Basic": []}, {"Bearer": []}], (method, path)
                assert {"401", "403", "404"} <= set(route["responses"])


def test_references_resolve() -> None:
    """Each reference in the OpenAPI document points at a schema in the document, and the document describes both
    authentication schemes."""
    components = api_document()["components"]
    references = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(api_document())))
    assert {"Errors", "Error"} <= references <= set(components["schemas"])
    assert {name: scheme["scheme"] for name, scheme in components["securitySchemes"].items()} == {
        "Basic": "basic",
        "Bearer": "bearer",
    }


def test_bodies_have_examples() -> None:
    """Each model of a request body has examples."""
    schemas = api_document()["components"]["schemas"]
    for name in ("NewUser", "NewRobot", "NewGroup", "NewGrant", "NewToken"):
        examples = [part.get("examples") for part in schemas[name]["properties"].values()]
        assert any(examples), name
