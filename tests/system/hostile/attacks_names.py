"""Attacks with expensive names, tags, digests, queries, ranges and credentials."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from functools import partial

from tests.system.hostile import costly_bodies
from tests.system.hostile.attack import KIB, Attack
from tests.system.hostile.attack_requests import AttackAnswer
from tests.system.hostile.attacked_site import AttackedSite
from tests.system.hostile.attacks_manifests import REPO

LINE = 31 * KIB
"""The length in bytes of a target or header that the server accepts. The limit for the request line and all headers is
32 KiB."""


def _get(target: str, site: AttackedSite) -> AttackAnswer:
    return site.ask("GET", target)


def _headed(target: str, headers: Mapping[str, str], site: AttackedSite) -> AttackAnswer:
    """Sends a GET with these headers."""
    return site.ask("GET", target, headers)


def _blob(headers: Mapping[str, str], site: AttackedSite) -> AttackAnswer:
    """Requests a blob of 1 MiB with these headers."""
    return site.ask("GET", f"/v2/{REPO}/blobs/{_large_blob(site)}", headers)


def _large_blob(site: AttackedSite) -> str:
    """Pushes a blob of 1 MiB, unless it exists already."""
    body = b"blob" * (256 * KIB)
    digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
    if site.ask("HEAD", f"/v2/{REPO}/blobs/{digest}").status != 200:
        answer = site.ask("POST", f"/v2/{REPO}/blobs/uploads/?digest={digest}", body=body)
        assert answer.status == 201, answer.data
    return digest


def _token_form(form: bytes, site: AttackedSite) -> AttackAnswer:
    """Sends a form to `/token`."""
    return site.ask("POST", "/token", {"Content-Type": "application/x-www-form-urlencoded"}, form)


def _passwords(site: AttackedSite) -> AttackAnswer:
    """Sends twenty requests with wrong passwords, one after another."""
    answer = AttackAnswer(0, b"", 0)
    for _ in range(20):
        credentials = base64.b64encode(f"admin:{site.fresh()}{'x' * 10_000}".encode()).decode()
        answer = site.ask("GET", "/v2/", {"Authorization": f"Basic {credentials}"})
    return answer


def _encoded(document: object) -> str:
    """Returns a part of a JWT: base64url of these bytes, or of this document as JSON."""
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    return base64.urlsafe_b64encode(text).rstrip(b"=").decode()


def _jwt(header: object, payload: object) -> str:
    """Returns an Authorization header with a JWT whose signature is wrong."""
    return f"Bearer {_encoded(header)}.{_encoded(payload)}.{_encoded(b's' * 32)}"


def _authorized(text: str, site: AttackedSite) -> AttackAnswer:
    """Sends this Authorization header."""
    return site.ask("GET", f"/v2/{REPO}/tags/list", {"Authorization": text})


_SCOPE_FIELD = b"grant_type=password&scope="
"""The beginning of a form for `/token`. Scopes follow."""
_ESCAPES = "\\\\" * (LINE // 2 - 100)
"""Escaped backslashes for a quoted cookie. Python's `http.cookies` resolves them in quadratic time."""
_HEADER = {"alg": "HS256", "typ": "JWT", "kid": "0"}
# By name: the limit that applies or the size, and the target of the request.
_TARGETS: dict[str, tuple[str, str]] = {
    "name: 255 characters": ("255", f"/v2/{'a' * 255}/tags/list"),
    "name: 127 levels": ("255", f"/v2/{'a/' * 127}a/tags/list"),
    "name: dashes, wrong at the end": ("255", f"/v2/{'a-' * 126}A/tags/list"),
    "name: separators, wrong at the end": ("31 KiB", f"/v2/{'a__' * (LINE // 3)}A/tags/list"),
    "name: long dashes, wrong at the end": ("31 KiB", f"/v2/a{'-' * LINE}/tags/list"),
    "name: slashes": ("31 KiB", f"/v2/{'/' * LINE}/tags/list"),
    "name: percent-encoded": ("31 KiB", f"/v2/{'%61' * (LINE // 3)}/tags/list"),
    "name: percent-encoded, no UTF-8": ("31 KiB", f"/v2/{'%ff' * (LINE // 3)}/tags/list"),
    "name: percent signs": ("31 KiB", f"/v2/{'%' * LINE}/tags/list"),
    "name: manifests again and again": ("31 KiB", f"/v2/{'manifests/' * (LINE // 10)}a"),
    "tag: 128 characters": ("128", f"/v2/{REPO}/manifests/{'a' * 128}"),
    "tag: long": ("31 KiB", f"/v2/{REPO}/manifests/{'a.' * (LINE // 2)}"),
    "digest: sha512": ("128", f"/v2/{REPO}/blobs/sha512:{'0' * 128}"),
    "digest: long": ("31 KiB", f"/v2/{REPO}/blobs/sha256:{'0' * LINE}"),
    "digest: long algorithm": ("31 KiB", f"/v2/{REPO}/blobs/{'a+' * (LINE // 2)}:00"),
    "digest: no ASCII": ("31 KiB", f"/v2/{REPO}/blobs/sha256:{'%d9%a0' * (LINE // 6)}"),
    "query: many parameters": ("31 KiB", f"/v2/{REPO}/tags/list?{'a&' * (LINE // 2)}"),
    "query: many names": ("31 KiB", f"/v2/{REPO}/tags/list?{'&'.join(f'a{n}=%61' for n in range(2800))}"),
    "query: one long value": ("31 KiB", f"/v2/{REPO}/tags/list?last={'%2f' * (LINE // 3)}"),
    "query: long n": ("31 KiB", f"/v2/{REPO}/tags/list?n={'9' * LINE}"),
    "query: at /token": ("31 KiB", f"/token?{'a=%61&' * (LINE // 6)}"),
    "query: at /api": ("31 KiB", f"/api/v1/users?{'a=%61&' * (LINE // 6)}"),
    "query: too long": ("64 KiB", f"/v2/_catalog?{'a&' * (32 * KIB)}"),
    "scopes: 1,000": (
        "31 KiB",
        "/token?service=entrepot&scope=" + "%20".join(f"repository:r{n}/a:pull" for n in range(1000)),
    ),
    "scopes: one with many actions": ("31 KiB", f"/token?scope=repository:a:{'pull,' * (LINE // 5)}pull"),
    "scopes: colons": ("31 KiB", f"/token?scope={':' * LINE}"),
    "scopes: spaces": ("31 KiB", f"/token?scope={'+' * LINE}"),
    "page: docs": ("", "/api/docs/swagger-ui-bundle.js"),
    "page: openapi.json": ("", "/api/openapi.json"),
    "page: not there": ("31 KiB", f"/{'a/' * (LINE // 2)}"),
}
# By name: the limit that applies or the size, and the header Range.
_RANGES: dict[str, tuple[str, str]] = {
    "range: 1,024": ("1,024", "bytes=" + ",".join(f"{n * 1000}-{n * 1000}" for n in range(1024))),
    "range: 1,024 overlapping": ("1,024", "bytes=" + ",".join("0-1048575" for _ in range(1024))),
    "range: 1,024 suffixes": ("1,024", "bytes=" + ",".join(f"-{n + 1}" for n in range(1024))),
    "range: too many": ("10,000", "bytes=" + ",".join("1-" for _ in range(10_000))),
    "range: commas": ("31 KiB", "bytes=" + "," * LINE),
    "range: spaces": ("31 KiB", "bytes=" + " " * LINE + "0-1"),
    "range: long number": ("31 KiB", f"bytes={'9' * LINE}-"),
    "range: one byte each": ("1,024", "bytes=" + ",".join(f"{n}-{n}" for n in range(1024))),
}
# By name: the limit that applies or the size, and the header Authorization.
_CREDENTIALS: dict[str, tuple[str, str]] = {
    "credentials: long Basic": ("31 KiB", f"Basic {base64.b64encode(b'a:' + b'b' * 22_000).decode()}"),
    "credentials: Basic of colons": ("31 KiB", f"Basic {base64.b64encode(b':' * 22_000).decode()}"),
    "credentials: long scheme": ("31 KiB", "a" * LINE),
    "credentials: spaces": ("31 KiB", f"Basic{' ' * LINE}a"),
    "credentials: long API token": ("31 KiB", f"Bearer ent_{'a' * LINE}"),
    "credentials: dots": ("31 KiB", f"Bearer {'.' * LINE}"),
    "JWT: large payload": ("31 KiB", _jwt(_HEADER, {"access": ["a"] * 4000})),
    "JWT: deep header": ("31 KiB", _jwt(b"[" * 20_000, {})),
    "JWT: deep payload": ("31 KiB", _jwt(_HEADER, b"[" * 20_000)),
    "JWT: no algorithm": ("", _jwt({"alg": "none"}, {"sub": "admin"})),
    "JWT: another algorithm": ("", _jwt({"alg": "RS256", "kid": "0"}, {"sub": "admin"})),
    "JWT: many numbers": ("31 KiB", _jwt(_HEADER, {"exp": int("9" * 4000)})),
}

ATTACKS = [
    *(Attack(name, limit, partial(_get, target)) for name, (limit, target) in _TARGETS.items()),
    *(Attack(name, limit, partial(_blob, {"Range": value})) for name, (limit, value) in _RANGES.items()),
    *(Attack(name, limit, partial(_authorized, value)) for name, (limit, value) in _CREDENTIALS.items()),
    Attack("etags: many", "31 KiB", partial(_blob, {"If-None-Match": ",".join('"a"' for _ in range(LINE // 4))})),
    Attack("etags: open quotes", "31 KiB", partial(_blob, {"If-None-Match": '"' * LINE})),
    Attack(
        "cookies: many", "31 KiB", partial(_headed, "/api/v1/me", {"Cookie": "; ".join("a=b" for _ in range(6000))})
    ),
    Attack("cookies: quotes", "31 KiB", partial(_headed, "/api/v1/me", {"Cookie": 'a="' + "\\" * (LINE - 100)})),
    Attack("cookies: escapes", "31 KiB", partial(_headed, "/api/v1/me", {"Cookie": f'a="{_ESCAPES}"'})),
    Attack("cookies: escapes, at /ui", "31 KiB", partial(_headed, "/ui/", {"Cookie": f'a="{_ESCAPES}"'})),
    Attack("cookies: escapes, at /login", "31 KiB", partial(_headed, "/login/callback", {"Cookie": f'a="{_ESCAPES}"'})),
    Attack("header: Host of dots", "31 KiB", lambda site: site.talk(_hosted("." * LINE))),
    Attack("header: Host of colons", "31 KiB", lambda site: site.talk(_hosted(":" * LINE))),
    Attack(
        "header: forwarded for many", "31 KiB", partial(_headed, "/v2/", {"X-Forwarded-For": "1.1.1.1," * (LINE // 8)})
    ),
    Attack("form: many fields", "64 KiB", partial(_token_form, b"a=%61&" * (64 * KIB // 6))),
    Attack("form: many names", "64 KiB", partial(_token_form, b"&".join(b"a%05d=" % n for n in range(8000)))),
    Attack("form: many scopes", "64 KiB", partial(_token_form, _SCOPE_FIELD + b"a:b:c+" * 10_000)),
    Attack(
        "form: one scope of commas", "64 KiB", partial(_token_form, _SCOPE_FIELD + b"repository:a:" + b"," * 65_000)
    ),
    Attack(
        "form: many scopes for the same names",
        "64 KiB",
        partial(
            _token_form, _SCOPE_FIELD + b"+".join(b"repository:a%d:pull" % (number % 99) for number in range(3000))
        ),
    ),
    Attack("form: too large", "16 MiB", partial(_token_form, b"a=" + b"b" * (16 << 20))),
    Attack("credentials: wrong passwords", "20", _passwords),
    Attack(
        "digest: of a query",
        "31 KiB",
        partial(_get, f"/v2/{REPO}/referrers/{costly_bodies.EMPTY}?artifactType={'a' * LINE}"),
    ),
]


def _hosted(host: str) -> bytes:
    """Returns a request with this Host header."""
    return f"GET /v2/_catalog HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
