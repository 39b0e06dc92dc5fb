"""The loads (`LOADS`) for the memory test. In each, two hundred clients at the same time send requests that make the
workers use much memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial

from storage.content import OCI_MANIFEST
from tests.system.hostile import attack_requests, costly_bodies, large_store
from tests.system.hostile.attack import KIB, MIB
from tests.system.hostile.attacked_site import AttackedSite
from tests.system.hostile.attacks_manifests import LARGEST, REPO
from tests.system.hostile.memory_growth import ClientLoad

_once = lru_cache(maxsize=2)
LAYER = 64 * MIB
"""The size of the pulled blob in bytes."""
PULLED_REPO = "hostile/seen"
"""The repository that the clients pull from."""


def prepare(site: AttackedSite) -> None:
    """Pushes the content that the clients pull: a blob of 64 MiB, and 16 manifests of 8 MiB."""
    for repo in (REPO, PULLED_REPO):
        _push(site, "POST", f"/v2/{repo}/blobs/uploads/?digest={costly_bodies.EMPTY}", b"{}")
    layer = costly_bodies.noise(LAYER)
    _push(site, "POST", f"/v2/{PULLED_REPO}/blobs/uploads/?digest={costly_bodies.noise_digest(LAYER)}", layer)
    for number in range(16):
        _push(
            site,
            "PUT",
            f"/v2/{PULLED_REPO}/manifests/m{number}",
            costly_bodies.one_annotation(LARGEST - 32 - number),
            {"Content-Type": OCI_MANIFEST},
        )


def _push(site: AttackedSite, method: str, target: str, body: bytes, headers: Mapping[str, str] | None = None) -> None:
    """Pushes a blob or a manifest, and checks that it was stored."""
    answer = site.ask(method, target, headers or {}, body)
    assert answer.status == 201, answer.data


def _get(target: Callable[[int], str], login: str = "") -> Callable[[int], Sequence[bytes]]:
    """Returns a function with the request of a client, a GET. `target`: from the number of the client."""
    headers = {"Authorization": login} if login else {}
    return lambda number: [attack_requests.head("GET", target(number), headers)]


def _put(make: Callable[[int], bytes], size: int = LARGEST, missing_bytes: int = 0) -> Callable[[int], Sequence[bytes]]:
    """Returns a function with the requests of a client, which pushes a manifest under a tag of its own. The client does
    not send the last `missing_bytes` bytes."""
    make_once = _once(make)

    def request(number: int) -> Sequence[bytes]:
        manifest = make_once(size)
        target = f"/v2/{REPO}/manifests/c{number}-{os.urandom(4).hex()}"
        request_head = attack_requests.head("PUT", target, {"Content-Type": OCI_MANIFEST}, length=len(manifest))
        return [request_head, manifest[: len(manifest) - missing_bytes]]

    return request


def _pipelined(target: str, count: int) -> Callable[[int], Sequence[bytes]]:
    """Returns a function with the requests of a client: `count` GET requests at once."""
    return lambda number: [attack_requests.head("GET", target, keep=True) * count]


def _pipelined_behind_a_blob(number: int) -> Sequence[bytes]:
    """Returns the requests of a client: a GET of a large blob, and 64 short requests behind it."""
    blob = attack_requests.head("GET", f"/v2/{PULLED_REPO}/blobs/{costly_bodies.noise_digest(LAYER)}", keep=True)
    return [blob + b"GET / HTTP/1.1\r\nHost:a\r\n\r\n" * 64]


def _after_long_texts(number: int) -> Sequence[bytes]:
    """Returns the requests of a client: pages of tags after 30 long texts, each requested twice, so that the server
    caches the pages."""
    texts = [f"%F0%9F%98%80{number:03d}{text:02d}{'z' * 1000}" for text in range(30)]
    targets = [f"/v2/large/tags/tags/list?n=1&last={text}" for text in texts]
    return [
        *(attack_requests.head("GET", target, keep=True) * 2 for target in targets),
        attack_requests.head("GET", "/v2/"),
    ]


def _posted(target: str, kind: str, body: bytes, site: AttackedSite) -> Callable[[int], Sequence[bytes]]:
    """Returns a function with the request of a client: a POST by the admin."""
    return lambda number: [
        attack_requests.head(
            "POST", target, {"Content-Type": kind, "Authorization": site.logins["admin"]}, length=len(body)
        )
        + body
    ]


def _uploaded(number: int) -> Sequence[bytes]:
    """Returns a request that uploads a blob of 8 MiB without its last byte."""
    target = f"/v2/{REPO}/blobs/uploads/?digest={costly_bodies.EMPTY}"
    return [attack_requests.head("POST", target, length=LARGEST), bytes(LARGEST - 1)]


def _far(name: str, item: str, site: AttackedSite) -> ClientLoad:
    """Returns a load in which each client requests another repository of a bad upstream."""
    mark = site.fresh()
    return ClientLoad(_get(lambda number: f"/v2/{site.upstreams.repository(name, f'{mark}c{number}')}/{item}"))


_REMOVAL = "/api/v1/repositories/large/tags/tag-removal"
_HUGE = f"/v2/large/huge/referrers/{large_store.HUGE_SUBJECT}"
_LISTED = f"/v2/large/referrers/referrers/{large_store.SUBJECT}"


def _manifest(number: int) -> str:
    """Returns the target of one of the 16 pushed manifests."""
    return f"/v2/{PULLED_REPO}/manifests/m{number % 16}"


def _catalog(number: int) -> str:
    """Returns the target of a large page of the catalog."""
    return f"/v2/_catalog?n=10000&last=r/{number:03d}"


# By name: the functions that return a load for the attacked server. `reads=False`: the clients do not read the
# responses. `holds=True`: the requests are incomplete, and the clients keep their connections open.
LOADS: Mapping[str, Callable[[AttackedSite], ClientLoad]] = {
    "manifests of empty objects": lambda site: ClientLoad(_put(costly_bodies.empty_objects)),
    "manifests with many annotations": lambda site: ClientLoad(_put(costly_bodies.many_annotations)),
    "manifests with a long artifact type": lambda site: ClientLoad(_put(costly_bodies.long_media_type)),
    "manifests with many layers": lambda site: ClientLoad(_put(costly_bodies.same_layers)),
    "manifests whose last byte never comes": lambda site: ClientLoad(
        _put(costly_bodies.one_annotation, missing_bytes=1), holds=True
    ),
    "small manifests of empty objects": lambda site: ClientLoad(_put(costly_bodies.empty_objects, 250_000)),
    "blobs whose last byte never comes": lambda site: ClientLoad(_uploaded, holds=True),
    "manifests read": lambda site: ClientLoad(_get(_manifest)),
    "manifests that nobody reads": lambda site: ClientLoad(_get(_manifest), reads=False),
    "blobs that nobody reads": lambda site: ClientLoad(
        _get(lambda number: f"/v2/{PULLED_REPO}/blobs/{costly_bodies.noise_digest(LAYER)}"), reads=False
    ),
    "referrers with huge annotations": lambda site: ClientLoad(_get(lambda number: _HUGE)),
    "referrers with huge annotations that nobody reads": lambda site: ClientLoad(
        _get(lambda number: _HUGE), reads=False
    ),
    "pages of referrers that nobody reads": lambda site: ClientLoad(
        _get(lambda number: f"{_LISTED}?last=sha256:{number:02x}"), reads=False
    ),
    "catalogs": lambda site: ClientLoad(_get(_catalog, site.logins["admin"])),
    "searches": lambda site: ClientLoad(
        _get(lambda number: f"/api/v1/search?q=r{number}&limit=100", site.logins["admin"])
    ),
    "tags that nobody reads": lambda site: ClientLoad(
        _get(lambda number: f"/v2/large/tags/tags/list?last=t{number:03d}"), reads=False
    ),
    "tags after long texts": lambda site: ClientLoad(_after_long_texts),
    "pipelined tags that nobody reads": lambda site: ClientLoad(
        _pipelined("/v2/large/tags/tags/list", 64), reads=False
    ),
    "pipelined requests behind a blob that nobody reads": lambda site: ClientLoad(
        _pipelined_behind_a_blob, reads=False
    ),
    "pipelined bundles that nobody reads": lambda site: ClientLoad(
        _pipelined("/api/docs/swagger-ui-bundle.js", 64), reads=False
    ),
    "audit": lambda site: ClientLoad(_get(lambda number: "/api/v1/audit?limit=1000", site.logins["admin"])),
    "api bodies": lambda site: ClientLoad(
        _posted("/api/v1/tokens", "application/json", b"[" + b",".join([b"{}"] * (21 * KIB)) + b"]", site)
    ),
    "api bodies with unknown fields that nobody reads": lambda site: ClientLoad(
        _posted(_REMOVAL, "application/json", costly_bodies.unknown_fields(66_000, digits=1), site), reads=False
    ),
    "api bodies with fewer unknown fields that nobody reads": lambda site: ClientLoad(
        _posted(_REMOVAL, "application/json", costly_bodies.unknown_fields(17_000, digits=30), site), reads=False
    ),
    "forms": lambda site: ClientLoad(
        _posted("/token", "application/x-www-form-urlencoded", b"a=%61&" * (10 * KIB), site)
    ),
    "upstream manifests of empty objects": partial(_far, "empty-objects", "manifests/a"),
    "upstream manifests without end": partial(_far, "endless", "manifests/a"),
    "upstream tags": partial(_far, "tags-large-pages", "tags/list"),
    "upstream referrers": partial(_far, "referrers-annotated", f"referrers/{costly_bodies.EMPTY}"),
    "upstream errors": partial(_far, "error-large", "manifests/a"),
    "upstream tokens": partial(_far, "token-objects", "manifests/a"),
}
