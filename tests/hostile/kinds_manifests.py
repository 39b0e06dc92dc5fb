"""Manifests as clients push and read them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial

from storage.content import OCI_INDEX, OCI_MANIFEST
from tests.hostile import bodies, sending
from tests.hostile.kinds import MIB, Kind
from tests.hostile.sending import Answer
from tests.hostile.site import Site

LARGEST = 8 * MIB
INLINE = 250_000
"""Bytes of a manifest that is small enough to be looked at on the event loop, if any is."""
REPO = "hostile/app"


def prepare(site: Site) -> None:
    """Pushes the one blob that the manifests refer to."""
    answer = site.ask("POST", f"/v2/{REPO}/blobs/uploads/?digest={bodies.EMPTY}", body=b"{}")
    assert answer.status == 201, answer.data


def put(site: Site, body: bytes, kind: str = OCI_MANIFEST, reference: str = "", query: str = "") -> Answer:
    target = f"/v2/{REPO}/manifests/{reference or site.fresh()}{query}"
    return site.ask("PUT", target, {"Content-Type": kind}, body)


def _pushed(make: Callable[[int], bytes], size: int, kind: str, site: Site) -> Answer:
    return put(site, make(size), kind)


def _read(make: Callable[[int], bytes], method: str, site: Site) -> Answer:
    """Pushed, and read by several."""
    tag = site.fresh()
    answer = put(site, make(LARGEST), reference=tag)
    for _ in range(3):
        answer = site.ask(method, f"/v2/{REPO}/manifests/{tag}")
    return answer


def _dripped(site: Site) -> Answer:
    """A byte every few milliseconds."""
    body = bodies.manifest(note=site.fresh())
    first = sending.head(
        "PUT", f"/v2/{REPO}/manifests/{site.fresh()}", {"Content-Type": OCI_MANIFEST}, length=len(body)
    )
    pause = threading.Event()

    def pieces() -> Iterator[bytes]:
        yield first
        for each in body:
            pause.wait(0.002)
            yield bytes([each])

    return sending.talk(site.port, pieces())


def _single_byte_chunks(site: Site) -> Answer:
    headers = {"Content-Type": OCI_MANIFEST, "Transfer-Encoding": "chunked"}
    first = sending.head("PUT", f"/v2/{REPO}/manifests/{site.fresh()}", headers)
    return site.talk(first + sending.chunks(bodies.manifest(note=site.fresh() + "x" * INLINE), 1))


def _cut_off(site: Site) -> Answer:
    """The client says 8 MiB, sends half, and leaves."""
    first = sending.head("PUT", f"/v2/{REPO}/manifests/{site.fresh()}", {"Content-Type": OCI_MANIFEST}, length=LARGEST)
    with sending.connect(site.port) as sock:
        sock.sendall(first + bodies.empty_objects(LARGEST)[: LARGEST // 2])
    return site.ask("GET", "/v2/")


def _said_too_long(site: Site) -> Answer:
    headers = {"Content-Type": OCI_MANIFEST}
    first = sending.head("PUT", f"/v2/{REPO}/manifests/{site.fresh()}", headers, length=1 << 60)
    return site.talk(first + b" " * MIB)


def _too_long(site: Site) -> Answer:
    headers = {"Content-Type": OCI_MANIFEST, "Transfer-Encoding": "chunked"}
    first = sending.head("PUT", f"/v2/{REPO}/manifests/{site.fresh()}", headers)
    return site.talk(first + sending.chunks(b" " * (2 * LARGEST), MIB))


def _subjects(site: Site) -> Answer:
    """A hundred manifests, each the subject of the next."""
    answer, subject = Answer(0, b"", 0), bodies.EMPTY
    for _ in range(100):
        answer = put(site, bodies.with_subject(site.fresh(), subject, 0))
        subject = answer.header(b"docker-content-digest") or subject
    return answer


def _by_sha512(site: Site) -> Answer:
    return put(site, bodies.spaces(LARGEST), reference=f"sha512:{'0' * 128}")


def _tags(count: int, site: Site) -> Answer:
    query = "?" + "&".join(f"tag={site.fresh()}{'x' * 100}" for _ in range(count))
    return put(site, bodies.manifest(note=site.fresh()), query=query)


def _deleted_layers(site: Site) -> Answer:
    """A manifest with as many layers as one may have, pushed and deleted."""
    answer = put(site, bodies.same_layers(LARGEST))
    return site.ask("DELETE", f"/v2/{REPO}/manifests/{answer.header(b'docker-content-digest') or bodies.EMPTY}")


def _deleted(name: str, what: str, site: Site) -> Answer:
    """One of those manifests that were made to be deleted."""
    from tests.hostile import large_store

    repo = f"{name}{site.number() % large_store.SPARE}"
    return site.ask("DELETE", f"/v2/{repo}/manifests/{large_store.digest(what % repo)}")


_LARGE: dict[str, Callable[[int], bytes]] = {
    "repeated names": bodies.repeated_names,
    "many annotations": bodies.many_annotations,
    "one long annotation": bodies.one_annotation,
    "empty objects": bodies.empty_objects,
    "empty lists": bodies.empty_lists,
    "nested lists": bodies.nested_lists,
    "deep lists": bodies.deep,
    "open brackets": bodies.opened,
    "many numbers": bodies.numbers,
    "many fractions": bodies.floats,
    "one long number": bodies.long_number,
    "one long exponent": bodies.long_exponent,
    "one long fraction": bodies.long_fraction,
    "many literals": bodies.literals,
    "NaN at the end": bodies.not_a_number,
    "escapes": bodies.escapes,
    "half surrogates": bodies.half_surrogates,
    "half surrogate after objects": bodies.late_half_surrogate,
    "bad UTF-8 at the end": bodies.bad_utf8,
    "byte order mark": bodies.marked,
    "spaces": bodies.spaces,
    "unfinished": bodies.unfinished,
    "many layers": bodies.many_layers,
    "one layer many times": bodies.same_layers,
    "long artifact type": bodies.long_media_type,
    "long config type": bodies.long_config_type,
    "long layer type": bodies.long_descriptor_type,
}
_INLINE = ("repeated names", "empty objects", "many annotations", "many numbers", "escapes", "one layer many times")

KINDS = [
    *(
        Kind(f"manifest: {name}", "8 MiB", partial(_pushed, make, LARGEST, OCI_MANIFEST))
        for name, make in _LARGE.items()
    ),
    *(
        Kind(f"small manifest: {name}", "250 KB", partial(_pushed, _LARGE[name], INLINE, OCI_MANIFEST))
        for name in _INLINE
    ),
    Kind("index: many entries", "8 MiB", partial(_pushed, bodies.many_children, LARGEST, OCI_INDEX)),
    Kind("index: large platform", "8 MiB", partial(_pushed, bodies.platforms, LARGEST, OCI_INDEX)),
    Kind("manifest: 60,000 layers", "5 MB", partial(_pushed, lambda size: bodies.bare_layers(60_000), 0, OCI_MANIFEST)),
    Kind("manifest: read with annotations", "8 MiB", partial(_read, bodies.many_annotations, "GET")),
    Kind("manifest: asked for with annotations", "8 MiB", partial(_read, bodies.many_annotations, "HEAD")),
    Kind("manifest: read with long artifact type", "8 MiB", partial(_read, bodies.long_media_type, "GET")),
    Kind("manifest: drips", "a byte in 2 ms", _dripped),
    Kind("manifest: chunks of one byte", "250 KB", _single_byte_chunks),
    Kind("manifest: client leaves midway", "8 MiB", _cut_off),
    Kind("manifest: says 2^60 bytes", "8 MiB", _said_too_long),
    Kind("manifest: chunks beyond the limit", "16 MiB", _too_long),
    Kind("manifest: wrong sha512", "8 MiB", _by_sha512),
    Kind("manifest: chain of subjects", "100", _subjects),
    Kind("manifest: many ?tag=", "100", partial(_tags, 100)),
    Kind("manifest: too many ?tag=", "250", partial(_tags, 250)),
    Kind("manifest: pushed and deleted with many layers", "8 MiB", _deleted_layers),
    Kind("delete: manifest with many tags", "30,000 tags", partial(_deleted, "wide/tags", "%s")),
    Kind("delete: manifest with many blobs", "30,000 blobs", partial(_deleted, "wide/blobs", "%s")),
]
