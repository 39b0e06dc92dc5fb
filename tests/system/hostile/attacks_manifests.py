"""Attacks that push, pull and delete expensive manifests."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from functools import partial

from storage.content import OCI_INDEX, OCI_MANIFEST
from tests.system.hostile import attack_requests, costly_bodies, large_store
from tests.system.hostile.attack import MIB, Attack
from tests.system.hostile.attack_requests import AttackAnswer
from tests.system.hostile.attacked_site import AttackedSite

LARGEST = 8 * MIB
"""The maximum size of a manifest."""
INLINE = 250_000
"""The size in bytes of a manifest that the server may parse on its event loop, because it is small."""
REPO = "hostile/app"


def prepare(site: AttackedSite) -> None:
    """Pushes the blob to which the manifests refer."""
    answer = site.ask("POST", f"/v2/{REPO}/blobs/uploads/?digest={costly_bodies.EMPTY}", body=b"{}")
    assert answer.status == 201, answer.data


def put(
    site: AttackedSite, body: bytes, kind: str = OCI_MANIFEST, reference: str = "", query: str = ""
) -> AttackAnswer:
    """Pushes a manifest, by default under a new tag. `kind`: its media type."""
    target = f"/v2/{REPO}/manifests/{reference or site.fresh()}{query}"
    return site.ask("PUT", target, {"Content-Type": kind}, body)


def _pushed(make: Callable[[int], bytes], size: int, kind: str, site: AttackedSite) -> AttackAnswer:
    """Pushes the manifest that `make` returns for this size."""
    return put(site, make(size), kind)


def _read(make: Callable[[int], bytes], method: str, site: AttackedSite) -> AttackAnswer:
    """Pushes a manifest, and requests it three times."""
    tag = site.fresh()
    answer = put(site, make(LARGEST), reference=tag)
    for _ in range(3):
        answer = site.ask(method, f"/v2/{REPO}/manifests/{tag}")
    return answer


def _dripped(site: AttackedSite) -> AttackAnswer:
    """Pushes a manifest byte by byte, one every 2 ms."""
    body = costly_bodies.manifest(note=site.fresh())
    request_head = attack_requests.head(
        "PUT", f"/v2/{REPO}/manifests/{site.fresh()}", {"Content-Type": OCI_MANIFEST}, length=len(body)
    )
    pause = threading.Event()  # is never set, so `wait` always takes the whole time

    def pieces() -> Iterator[bytes]:
        yield request_head
        for byte in body:
            pause.wait(0.002)
            yield bytes([byte])

    return attack_requests.talk(site.port, pieces())


def _single_byte_chunks(site: AttackedSite) -> AttackAnswer:
    """Pushes a manifest in chunks of one byte."""
    headers = {"Content-Type": OCI_MANIFEST, "Transfer-Encoding": "chunked"}
    request_head = attack_requests.head("PUT", f"/v2/{REPO}/manifests/{site.fresh()}", headers)
    return site.talk(request_head + attack_requests.chunks(costly_bodies.manifest(note=site.fresh() + "x" * INLINE), 1))


def _cut_off(site: AttackedSite) -> AttackAnswer:
    """Declares 8 MiB, sends half of them, and disconnects."""
    request_head = attack_requests.head(
        "PUT", f"/v2/{REPO}/manifests/{site.fresh()}", {"Content-Type": OCI_MANIFEST}, length=LARGEST
    )
    with attack_requests.connect(site.port) as sock:
        sock.sendall(request_head + costly_bodies.empty_objects(LARGEST)[: LARGEST // 2])
    return site.ask("GET", "/v2/")


def _declared_too_long(site: AttackedSite) -> AttackAnswer:
    """Declares a manifest of 2^60 bytes."""
    headers = {"Content-Type": OCI_MANIFEST}
    request_head = attack_requests.head("PUT", f"/v2/{REPO}/manifests/{site.fresh()}", headers, length=1 << 60)
    return site.talk(request_head + b" " * MIB)


def _too_long(site: AttackedSite) -> AttackAnswer:
    """Sends twice the maximum size in chunks."""
    headers = {"Content-Type": OCI_MANIFEST, "Transfer-Encoding": "chunked"}
    request_head = attack_requests.head("PUT", f"/v2/{REPO}/manifests/{site.fresh()}", headers)
    return site.talk(request_head + attack_requests.chunks(b" " * (2 * LARGEST), MIB))


def _subjects(site: AttackedSite) -> AttackAnswer:
    """Pushes a hundred manifests. Each has the previous manifest as its subject."""
    answer, subject = AttackAnswer(0, b"", 0), costly_bodies.EMPTY
    for _ in range(100):
        answer = put(site, costly_bodies.with_subject(site.fresh(), subject, 0))
        subject = answer.header(b"docker-content-digest") or subject
    return answer


def _by_sha512(site: AttackedSite) -> AttackAnswer:
    """Pushes a manifest under a SHA-512 digest that is wrong."""
    return put(site, costly_bodies.spaces(LARGEST), reference=f"sha512:{'0' * 128}")


def _tags(count: int, site: AttackedSite) -> AttackAnswer:
    """Pushes a manifest with `count` tags in the query."""
    query = "?" + "&".join(f"tag={site.fresh()}{'x' * 100}" for _ in range(count))
    return put(site, costly_bodies.manifest(note=site.fresh()), query=query)


def _deleted_layers(site: AttackedSite) -> AttackAnswer:
    """Pushes and deletes a manifest with the largest number of layers."""
    answer = put(site, costly_bodies.same_layers(LARGEST))
    return site.ask("DELETE", f"/v2/{REPO}/manifests/{answer.header(b'docker-content-digest') or costly_bodies.EMPTY}")


def _nested_files(site: AttackedSite) -> AttackAnswer:
    """Requests the files of an artifact that lists the same blob ten times. The blob is an in-toto envelope with a
    deeply nested statement."""
    statement = f'{{"{site.fresh()}":{"[" * 900}{",".join("1" * 20_000)}{"]" * 900}}}'
    data = json.dumps({"payload": base64.b64encode(statement.encode()).decode()}).encode()
    blob = f"sha256:{hashlib.sha256(data).hexdigest()}"
    site.ask("POST", f"/v2/{REPO}/blobs/uploads/?digest={blob}", body=data)
    layer = {"mediaType": "application/vnd.in-toto+json", "digest": blob, "size": len(data)}
    tag = site.fresh()
    put(site, costly_bodies.manifest(layers=[layer] * 10), reference=tag)
    return site.ask("GET", f"/api/v1/repositories/{REPO}/manifests/{tag}/files", login="admin")


def _deleted(name: str, text_format: str, site: AttackedSite) -> AttackAnswer:
    """Deletes one of the manifests that `large_store` has made for this purpose. `text_format`: the format of the text
    whose digest the manifest has."""
    repo = f"{name}{site.number() % large_store.SPARE_COPIES}"
    return site.ask("DELETE", f"/v2/{repo}/manifests/{large_store.digest(text_format % repo)}")


# By name: the functions that return a large manifest for a size in bytes.
_LARGE: dict[str, Callable[[int], bytes]] = {
    "repeated names": costly_bodies.repeated_names,
    "many annotations": costly_bodies.many_annotations,
    "one long annotation": costly_bodies.one_annotation,
    "empty objects": costly_bodies.empty_objects,
    "empty lists": costly_bodies.empty_lists,
    "nested lists": costly_bodies.nested_lists,
    "deep lists": costly_bodies.deep,
    "open brackets": costly_bodies.opened,
    "many numbers": costly_bodies.numbers,
    "many fractions": costly_bodies.floats,
    "one long number": costly_bodies.long_number,
    "one long exponent": costly_bodies.long_exponent,
    "one long fraction": costly_bodies.long_fraction,
    "many literals": costly_bodies.literals,
    "NaN at the end": costly_bodies.not_a_number,
    "escapes": costly_bodies.escapes,
    "half surrogates": costly_bodies.half_surrogates,
    "half surrogate after objects": costly_bodies.late_half_surrogate,
    "bad UTF-8 at the end": costly_bodies.bad_utf8,
    "byte order mark": costly_bodies.marked,
    "spaces": costly_bodies.spaces,
    "unfinished": costly_bodies.unfinished,
    "many layers": costly_bodies.many_layers,
    "one layer many times": costly_bodies.same_layers,
    "long artifact type": costly_bodies.long_media_type,
    "long config type": costly_bodies.long_config_type,
    "long layer type": costly_bodies.long_descriptor_type,
}
# The names of the manifests that are also pushed in a small size.
_INLINE = ("repeated names", "empty objects", "many annotations", "many numbers", "escapes", "one layer many times")

ATTACKS = [
    *(
        Attack(f"manifest: {name}", "8 MiB", partial(_pushed, make, LARGEST, OCI_MANIFEST))
        for name, make in _LARGE.items()
    ),
    *(
        Attack(f"small manifest: {name}", "250 KB", partial(_pushed, _LARGE[name], INLINE, OCI_MANIFEST))
        for name in _INLINE
    ),
    Attack("index: many entries", "8 MiB", partial(_pushed, costly_bodies.many_children, LARGEST, OCI_INDEX)),
    Attack("index: large platform", "8 MiB", partial(_pushed, costly_bodies.platforms, LARGEST, OCI_INDEX)),
    Attack(
        "manifest: 60,000 layers",
        "5 MB",
        partial(_pushed, lambda size: costly_bodies.bare_layers(60_000), 0, OCI_MANIFEST),
    ),
    Attack("manifest: read with annotations", "8 MiB", partial(_read, costly_bodies.many_annotations, "GET")),
    Attack("manifest: asked for with annotations", "8 MiB", partial(_read, costly_bodies.many_annotations, "HEAD")),
    Attack("manifest: read with long artifact type", "8 MiB", partial(_read, costly_bodies.long_media_type, "GET")),
    Attack("manifest: drips", "a byte in 2 ms", _dripped),
    Attack("manifest: chunks of one byte", "250 KB", _single_byte_chunks),
    Attack("manifest: client leaves midway", "8 MiB", _cut_off),
    Attack("manifest: says 2^60 bytes", "8 MiB", _declared_too_long),
    Attack("manifest: chunks beyond the limit", "16 MiB", _too_long),
    Attack("manifest: wrong sha512", "8 MiB", _by_sha512),
    Attack("manifest: chain of subjects", "100", _subjects),
    Attack("manifest: many ?tag=", "100", partial(_tags, 100)),
    Attack("manifest: too many ?tag=", "250", partial(_tags, 250)),
    Attack("manifest: pushed and deleted with many layers", "8 MiB", _deleted_layers),
    Attack("look: files with a deep statement", "64 KiB", _nested_files),
    Attack("delete: manifest with many tags", "30,000 tags", partial(_deleted, "wide/tags", "%s")),
    Attack("delete: manifest with many blobs", "30,000 blobs", partial(_deleted, "wide/blobs", "%s")),
]
