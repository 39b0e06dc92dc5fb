"""Tests of how the registry reads the cookies of a request."""

from __future__ import annotations

from pathlib import Path

import httpx2
import pytest
from fastapi import Request

from registry.admin.cookies import cookie_value, separate_cookies
from registry.app import create_app
from registry.config import Settings
from registry.response_limits import NoCookies
from storage.memory_registry import MemoryRegistry


def value_in(*headers: str) -> str:
    """Returns the value of the cookie `a` in a request with these Cookie headers."""
    scope = {"headers": [(b"host", b"x"), *((b"cookie", text.encode("latin-1")) for text in headers)]}
    separate_cookies(scope)
    return cookie_value(scope, "a")


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("a=1", "1"),
        ("b=2; a=1;c=3", "1"),
        (" a = 1 ", "1"),
        ("a=1=2", "1=2"),
        ('a="1"', "1"),
        ('a=""', ""),
        ('a="', '"'),
        ("a", ""),
        ("aa=1; ba=2", ""),
        (";;=;a=1;", "1"),
        ("a=1; a=2", "2"),
        ("", ""),
        ("a=\xff", "\xff"),
        ("a=1; \xa0a=2; \x85a=3; \x1fa=4", "1"),
        ("a=1\x85", "1\x85"),
    ],
)
def test_cookie_value(header: str, value: str) -> None:
    """The value of a cookie is the text after the first `=`, without spaces and quotes around it. The last cookie of a
    name counts. Only spaces and tabs are removed before a name, and no other white space such as a no-break space. A
    browser protects a cookie only if its name begins with `__Host-`. So any host of the domain can set a cookie whose
    name is a no-break space followed by `__Host-…`. This cookie must not replace the protected one."""
    assert value_in(header) == value


def test_cookie_in_one_of_several_headers() -> None:
    """A cookie is found in any of several Cookie headers, as HTTP/2 proxies send them."""
    assert value_in("b=1", "a=2", "c=3") == "2"
    assert value_in() == ""


def test_escapes_in_a_cookie_are_not_resolved() -> None:
    """Backslashes in a cookie are ordinary characters. The standard library resolves such escapes in quadratic time."""
    escapes = "\\\\" * 15_000
    assert value_in(f'a="{escapes}"') == escapes


async def test_fastapi_gets_no_cookies(tmp_path: Path, registry: MemoryRegistry) -> None:
    """FastAPI gets no Cookie header, because it would parse the header in quadratic time for every request. The
    registry's own code can still read the cookies."""
    app = create_app(Settings(data=tmp_path), registry)

    @app.get("/cookies")
    async def show_cookies(request: Request) -> dict[str, object]:
        return {
            "parsed": request.cookies,
            "header": request.headers.get("cookie"),
            "a": cookie_value(request.scope, "a"),
        }

    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://registry.test") as client:
        answer = await client.get("/cookies", headers={"cookie": "a=1; b=2"})
    assert answer.json() == {"parsed": {}, "header": None, "a": "1"}


async def test_cookies_of_other_servers_are_not_parsed() -> None:
    """The clients for upstreams and webhooks do not look at the cookies in a response: the client gets a response whose
    cookies cannot be parsed, and works."""
    headers = [("set-cookie", "a=1"), ("set-cookie2", "," * 1000)]
    transport = httpx2.MockTransport(lambda _: httpx2.Response(200, headers=headers))
    async with httpx2.AsyncClient(transport=transport, cookies=NoCookies()) as client:
        assert (await client.get("http://registry.test/")).status_code == 200
        assert not client.cookies
