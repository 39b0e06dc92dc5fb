"""Attacks that request expensive lists from a large store: repositories, tags, referrers, and lists of the management
API."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from urllib.parse import quote

from storage.content import OCI_MANIFEST
from tests.system.hostile import attack_requests, costly_bodies, large_store
from tests.system.hostile.attack import KIB, Attack
from tests.system.hostile.attack_requests import AttackAnswer
from tests.system.hostile.attacked_site import AttackedSite
from tests.system.hostile.attacks_manifests import REPO

STREAM_IDLE_SECONDS = 3.0
"""Seconds without an event after which a stream is closed."""
STREAM_BYTES = 4 << 20
"""The number of bytes of a stream that are read. The stream has ten times as many bytes, all of the same kind."""


def _listed(target: str, login: str, site: AttackedSite) -> AttackAnswer:
    """Requests a list. `FRESH` in the target is replaced by a new number, so that no cache has the response."""
    return site.ask("GET", target.replace("FRESH", str(site.number())), login=login)


def _paged(target: str, login: str, pages: int, site: AttackedSite) -> AttackAnswer:
    """Requests a list, page by page: follows the Link header of each response, up to `pages` pages."""
    answer = site.ask("GET", target, login=login)
    for _ in range(pages - 1):
        link = answer.header(b"link")
        if not link:
            break
        answer = site.ask("GET", link[1 : link.index(">")], login=login)
    return answer


def _streamed(target: str, login: str, site: AttackedSite) -> AttackAnswer:
    """Requests a stream of all old events. Reads a part of the stream, or until no event has come for a few
    seconds."""
    headers = {"Authorization": site.logins[login], "Accept": "text/event-stream", "Last-Event-ID": "0"}
    with attack_requests.connect(site.port) as sock:
        sock.settimeout(STREAM_IDLE_SECONDS)
        sock.sendall(attack_requests.head("GET", target, headers, keep=True))
        return attack_requests.read(sock, most=STREAM_BYTES)


def _posted(target: str, body: bytes, method: str, site: AttackedSite, login: str = "admin") -> AttackAnswer:
    """Sends JSON to the management API."""
    return site.ask(method, target, {"Content-Type": "application/json"}, body, login=login)


def _limits(site: AttackedSite) -> AttackAnswer:
    """Creates an API token with as many patterns as allowed. The patterns are expensive to match."""
    patterns = ["a*" * 127 + str(number % 10) for number in range(50)]
    limits = [{"pattern": pattern, "actions": ["pull"]} for pattern in patterns]
    return _posted("/api/v1/tokens", json.dumps({"account": "admin", "limits": limits}).encode(), "POST", site)


def _grants(site: AttackedSite) -> AttackAnswer:
    """Creates a grant (a permission for the names that match a pattern) whose pattern is expensive to compare with
    others."""
    pattern = f"{'a*' * 100}{site.fresh()}"
    body = {"subject": "everyone", "pattern": pattern, "actions": ["pull"]}
    return _posted("/api/v1/grants", json.dumps(body).encode(), "PUT", site)


def _details_of_image(history: str, site: AttackedSite) -> AttackAnswer:
    """Pushes an image whose config has this text as the command of three build steps, and requests its details."""
    config = json.dumps({"author": str(site.number()), "history": [{"created_by": history}] * 3}).encode()
    digest = f"sha256:{hashlib.sha256(config).hexdigest()}"
    site.ask("POST", f"/v2/{REPO}/blobs/uploads/?digest={digest}", body=config)
    manifest = costly_bodies.manifest(config={**costly_bodies.CONFIG, "digest": digest, "size": len(config)})
    site.ask("PUT", f"/v2/{REPO}/manifests/history", {"Content-Type": OCI_MANIFEST}, manifest)
    return site.ask("GET", f"/api/v1/repositories/{REPO}/manifests/history/details", login="admin")


def _described(text: str, site: AttackedSite) -> AttackAnswer:
    """Writes the description of a repository, and reads it."""
    path = f"/api/v1/repositories/{REPO}/description"
    written = site.ask(
        "PUT", path, {"Content-Type": "application/json"}, json.dumps({"text": text}).encode(), login="admin"
    )
    assert written.status == 200, written
    return site.ask("GET", path, login="admin")


_REFERRERS = "/v2/large/referrers/referrers/" + large_store.SUBJECT
_BARE = "/v2/large/bare/referrers/" + large_store.BARE_SUBJECT
_HUGE = "/v2/large/huge/referrers/" + large_store.HUGE_SUBJECT

# By name: the limit that applies, the target, and the account that requests it.
_LISTS: dict[str, tuple[str, str, str]] = {
    "catalog: n=1000000": ("10,000", "/v2/_catalog?n=1000000&last=FRESH", "admin"),
    "catalog: last in the middle": ("1,000", "/v2/_catalog?last=r/1FRESH", "admin"),
    "catalog: 40 slow patterns": ("200,000", "/v2/_catalog?last=FRESH", "limited"),
    "catalog: 40 slow patterns, n=1000000": ("200,000", "/v2/_catalog?n=1000000&last=FRESH", "limited"),
    "catalog: one pattern that matches nothing": ("200,000", "/v2/_catalog?last=FRESH", "one"),
    "catalog: thousands of grants": ("5,000", "/v2/_catalog?last=FRESH", "many"),
    "catalog: a long last": ("31 KiB", f"/v2/_catalog?last={'r/' * (15 * KIB)}FRESH", "limited"),
    "catalog: a last of the largest length": ("1,024", f"/v2/_catalog?last={'r/' * 500}FRESH", "limited"),
    "tags: n=1000000": ("10,000", "/v2/large/tags/tags/list?n=1000000&last=tFRESH", ""),
    "tags: no n": ("10,000", "/v2/large/tags/tags/list?last=t0FRESH", ""),
    "tags: a pull by an account with thousands of grants": ("5,000", "/v2/team1/a/b/tags/list?last=FRESH", "many"),
    "referrers: annotated": ("20,000", f"{_REFERRERS}?last=sha256:FRESH", ""),
    "referrers: of no such type": ("20,000", f"{_REFERRERS}?artifactType=a/FRESH", ""),
    "referrers: bare": ("50,000", f"{_BARE}?last=sha256:FRESH", ""),
    "referrers: bare, of no such type": ("50,000", f"{_BARE}?artifactType=a/FRESH", ""),
    "referrers: huge annotations": ("6 MiB each", f"{_HUGE}?artifactType=application/vnd.example.sbom", ""),
    "look: tags by version": (
        "100,000",
        "/api/v1/repositories/large/tags/tag-list?order=version&limit=200&text=FRESH",
        "admin",
    ),
    "api: users": ("", "/api/v1/users?limit=1000", "admin"),
    "api: grants": ("5,000", "/api/v1/grants", "admin"),
    "api: grants of one account": ("5,000", "/api/v1/grants?subject=user:many", "admin"),
    "api: me with thousands of grants": ("5,000", "/api/v1/me", "many"),
    "api: tokens": ("", "/api/v1/tokens", "admin"),
    "api: audit": ("200,000", "/api/v1/audit?limit=1000", "admin"),
    "api: audit of one repository": ("100,000", "/api/v1/audit?limit=1000&target=large/tags", "admin"),
    "api: audit of nobody": ("200,000", "/api/v1/audit?limit=1000&actor=nobody", "admin"),
    "api: audit of one action": ("200,000", "/api/v1/audit?limit=1000&action=tag.put", "admin"),
    "api: audit of a pattern": ("200,000", "/api/v1/audit?limit=1000&target=zz&outcome=denied", "admin"),
    "api: audit of a digest": ("100,000", "/api/v1/audit?target=large/tags@sha256:" + "0" * 64, "admin"),
    "api: audit of a tag": ("100,000", "/api/v1/audit?target=large/tags:none", "admin"),
    "events: not visible": ("100,000", "/api/v1/events?limit=1000", "limited"),
    "events: all": ("100,000", "/api/v1/events?limit=1000", "admin"),
    "events: of a repository without events": ("100,000", "/api/v1/events?limit=1000&repository=FRESH", "admin"),
    "jobs: with long results": ("1,000", "/api/v1/jobs?limit=1000", "admin"),
    "jobs: of one kind": ("1,000", "/api/v1/jobs?limit=1000&kind=gc", "admin"),
    "jobs: in the status": ("1,000", "/api/v1/status", "admin"),
    "api: audit since": ("200,000", "/api/v1/audit?limit=1000&since=2026-01-01T00:00:00Z", "admin"),
}
# By name: the limit that applies, and the body that is sent to the management API.
_BODIES: dict[str, tuple[str, bytes]] = {
    "api: deep JSON": ("64 KiB", b"[" * (64 * KIB)),
    "api: deep object": ("64 KiB", b'{"a":' * (12 * KIB)),
    "api: many names": ("64 KiB", b"{" + b",".join(b'"a%05d":1' % n for n in range(6000)) + b"}"),
    "api: many objects": ("64 KiB", b"[" + b",".join([b"{}"] * (21 * KIB)) + b"]"),
    "api: long number": ("64 KiB", b'{"name":' + b"9" * (63 * KIB) + b"}"),
    "api: many limits": ("64 KiB", b'{"account":"admin","limits":[' + b",".join([b'{"pattern":1}'] * 4500) + b"]}"),
    "api: long name": ("64 KiB", b'{"name":"' + b"a" * (63 * KIB) + b'"}'),
    "api: too large": ("16 MiB", b'{"name":"' + b"a" * (16 << 20) + b'"}'),
}
_REMOVAL = "/api/v1/repositories/large/tags/tag-removal"
# By name: a body of 600 KiB that is sent to the route for the removal of tags.
_REMOVALS: dict[str, bytes] = {
    "api: unknown fields": costly_bodies.unknown_fields(66_000, digits=1),
    "api: unknown fields within the limit of values": costly_bodies.unknown_fields(17_000, digits=30),
    "api: digests that are numbers": b'{"tags":["a"],"digests":'
    + costly_bodies.unknown_fields(60_000, digits=1)
    + b"}",
    "api: tags that are numbers": b'{"tags":[' + b",".join([b"1"] * 300_000) + b"]}",
    "api: lists in lists": b'{"tags":[' + b",".join([b"[]"] * 200_000) + b"]}",
    "api: a long field": b'{"' + b"\\u00e9" * 100_000 + b'":1}',
}
# By name: a description in Markdown.
_DESCRIPTIONS: dict[str, str] = {
    "api: description with a table that grows": "|" + "a|" * 300 + "\n|" + "-|" * 300 + "\n" + "x|\n" * 600,
    "api: description of headings": "#\n" * (32 * KIB),
    "api: description of references to a long address": "[a]: http://" + "x" * 30_000 + "\n\n" + "![a]" * 1000,
    "api: description of images that are never closed": "![" * (32 * KIB),
    "api: description of lines that continue nested quotes": "> " * 19 + "a\n" + "b\n" * 32_700,
    "api: description of escaped characters": "a\n" + "<" * (256 * KIB - 2),
}

ATTACKS = [
    *(Attack(name, "640 KiB", partial(_posted, _REMOVAL, body, "POST")) for name, body in _REMOVALS.items()),
    Attack(
        "api: unknown fields without a login",
        "640 KiB",
        partial(_posted, _REMOVAL, _REMOVALS["api: unknown fields"], "POST", login=""),
    ),
    *(Attack(name, limit, partial(_listed, target, login)) for name, (limit, target, login) in _LISTS.items()),
    *(Attack(name, limit, partial(_posted, "/api/v1/tokens", body, "POST")) for name, (limit, body) in _BODIES.items()),
    Attack("catalog: 20 pages of 10,000", "200,000", partial(_paged, "/v2/_catalog?n=10000", "admin", 20)),
    Attack("catalog: 20 pages through slow patterns", "200,000", partial(_paged, "/v2/_catalog?n=10", "limited", 20)),
    Attack("tags: 10 pages of 10,000", "100,000", partial(_paged, "/v2/large/tags/tags/list", "", 10)),
    Attack("referrers: 10 pages", "20,000", partial(_paged, _REFERRERS, "", 10)),
    Attack("api: 10 pages of audit", "200,000", partial(_paged, "/api/v1/audit?limit=1000", "admin", 10)),
    Attack("events: a stream that shows none", "100,000", partial(_streamed, "/api/v1/events", "limited")),
    Attack("events: a stream of all", "100,000", partial(_streamed, "/api/v1/events", "admin")),
    Attack("events: a stream with a filter", "100,000", partial(_streamed, "/api/v1/events?action=fill", "admin")),
    Attack("api: token with slow patterns", "50", _limits),
    Attack("api: details of an image with a history of spaces", "4096", partial(_details_of_image, " " * 4095 + "x")),
    *(Attack(name, "256 KiB", partial(_described, text)) for name, text in _DESCRIPTIONS.items()),
    Attack("api: grant of a slow pattern", "255", _grants),
    Attack("api: users like a pattern", "", partial(_listed, f"/api/v1/users?after={quote('z' * 80)}", "admin")),
]
