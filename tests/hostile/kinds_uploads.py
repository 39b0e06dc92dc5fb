"""Uploads and mounts."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from functools import partial

from tests.hostile import bodies, sending
from tests.hostile.kinds import MIB, Kind
from tests.hostile.kinds_manifests import REPO
from tests.hostile.sending import Answer
from tests.hostile.site import Site

LARGE = 128 * MIB


def _start(site: Site, query: str = "") -> str:
    return site.ask("POST", f"/v2/{REPO}/blobs/uploads/{query}").header(b"location")


def _many_patches(site: Site) -> Answer:
    """A byte in each, on one connection."""
    place = _start(site)
    with sending.connect(site.port) as sock:
        for number in range(300):
            headers = {"Content-Range": f"{number}-{number}"}
            sock.sendall(sending.head("PATCH", place, headers, length=1, keep=True) + b"a")
            if not sock.recv(65536):
                break
        sock.sendall(sending.head("GET", place))
        return sending.read(sock)


def _closed(algorithm: str, site: Site) -> Answer:
    """A large blob that is closed by a digest of another algorithm than it was begun with, where that is so."""
    piece = random.Random(site.number()).randbytes(MIB)
    place = _start(site)

    def pieces() -> Iterator[bytes]:
        yield sending.head("PATCH", place, length=LARGE)
        for _ in range(LARGE // MIB):
            yield piece

    sending.talk(site.port, pieces())
    digest = hashlib.new(algorithm)
    for _ in range(LARGE // MIB):
        digest.update(piece)
    return site.ask("PUT", f"{place}?digest={algorithm}:{digest.hexdigest()}", body=b"")


def _sessions(site: Site) -> Answer:
    """Many of them, on one connection."""
    with sending.connect(site.port) as sock:
        for _ in range(300):
            sock.sendall(sending.head("POST", f"/v2/{REPO}/blobs/uploads/", length=0, keep=True))
            if not sock.recv(65536):
                break
        sock.sendall(sending.head("GET", "/v2/"))
        return sending.read(sock)


def _mounts(source: str, site: Site) -> Answer:
    """Pipelined, as many as are looked at."""
    target = f"/v2/hostile/mounted{site.fresh()}/blobs/uploads/?mount={bodies.EMPTY}{source}"
    one = sending.head("POST", target, length=0, keep=True)
    return site.talk(one * 63 + sending.head("POST", target, length=0))


def _ranged(value: str, site: Site) -> Answer:
    return site.ask("PATCH", _start(site), {"Content-Range": value}, b"a")


def _cancelled(site: Site) -> Answer:
    """A session with much in it is given up."""
    place = _start(site)
    site.ask("PATCH", place, body=b"a" * (32 * MIB))
    return site.ask("DELETE", place)


KINDS = [
    Kind("upload: many small PATCHes", "300", _many_patches),
    Kind("upload: large, closed by sha256", "128 MiB", partial(_closed, "sha256")),
    Kind("upload: large, closed by sha512", "128 MiB", partial(_closed, "sha512")),
    Kind("upload: many sessions", "300", _sessions),
    Kind("upload: long Content-Range", "31 KiB", partial(_ranged, f"{'9' * 15_000}-{'9' * 15_000}")),
    Kind("upload: Content-Range beyond any blob", "", partial(_ranged, "999999999999999999-999999999999999999")),
    Kind("upload: given up", "32 MiB", _cancelled),
    Kind("upload: mounts", "64", partial(_mounts, f"&from={REPO}")),
    Kind("upload: mounts from anywhere", "64", partial(_mounts, "")),
    Kind("upload: mounts from nowhere", "64", partial(_mounts, "&from=none/there")),
]
