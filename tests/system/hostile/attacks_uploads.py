"""Uploads and mounts."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from functools import partial

from tests.system.hostile import attack_requests, costly_bodies
from tests.system.hostile.attack import MIB, Attack
from tests.system.hostile.attack_requests import AttackAnswer
from tests.system.hostile.attacked_site import AttackedSite
from tests.system.hostile.attacks_manifests import REPO

LARGE = 128 * MIB


def _start(site: AttackedSite, query: str = "") -> str:
    return site.ask("POST", f"/v2/{REPO}/blobs/uploads/{query}").header(b"location")


def _many_patches(site: AttackedSite) -> AttackAnswer:
    """Sends many PATCHes with one byte each on one connection."""
    place = _start(site)
    with attack_requests.connect(site.port) as sock:
        for number in range(300):
            headers = {"Content-Range": f"{number}-{number}"}
            sock.sendall(attack_requests.head("PATCH", place, headers, length=1, keep=True) + b"a")
            if not sock.recv(65536):
                break
        sock.sendall(attack_requests.head("GET", place))
        return attack_requests.read(sock)


def _closed(algorithm: str, site: AttackedSite) -> AttackAnswer:
    """Closes the session of a large blob with a digest of `algorithm`, which may be another one than at its start."""
    piece = random.Random(site.number()).randbytes(MIB)
    place = _start(site)

    def pieces() -> Iterator[bytes]:
        yield attack_requests.head("PATCH", place, length=LARGE)
        for _ in range(LARGE // MIB):
            yield piece

    attack_requests.talk(site.port, pieces())
    digest = hashlib.new(algorithm)
    for _ in range(LARGE // MIB):
        digest.update(piece)
    return site.ask("PUT", f"{place}?digest={algorithm}:{digest.hexdigest()}", body=b"")


def _sessions(site: AttackedSite) -> AttackAnswer:
    """Starts many sessions on one connection."""
    with attack_requests.connect(site.port) as sock:
        for _ in range(300):
            sock.sendall(attack_requests.head("POST", f"/v2/{REPO}/blobs/uploads/", length=0, keep=True))
            if not sock.recv(65536):
                break
        sock.sendall(attack_requests.head("GET", "/v2/"))
        return attack_requests.read(sock)


def _mounts(source: str, site: AttackedSite) -> AttackAnswer:
    """Sends the largest number of pipelined mounts."""
    target = f"/v2/hostile/mounted{site.fresh()}/blobs/uploads/?mount={costly_bodies.EMPTY}{source}"
    one = attack_requests.head("POST", target, length=0, keep=True)
    return site.talk(one * 63 + attack_requests.head("POST", target, length=0))


def _ranged(value: str, site: AttackedSite) -> AttackAnswer:
    return site.ask("PATCH", _start(site), {"Content-Range": value}, b"a")


def _cancelled(site: AttackedSite) -> AttackAnswer:
    """Cancels a session with many bytes."""
    place = _start(site)
    site.ask("PATCH", place, body=b"a" * (32 * MIB))
    return site.ask("DELETE", place)


ATTACKS = [
    Attack("upload: many small PATCHes", "300", _many_patches),
    Attack("upload: large, closed by sha256", "128 MiB", partial(_closed, "sha256")),
    Attack("upload: large, closed by sha512", "128 MiB", partial(_closed, "sha512")),
    Attack("upload: many sessions", "300", _sessions),
    Attack("upload: long Content-Range", "31 KiB", partial(_ranged, f"{'9' * 15_000}-{'9' * 15_000}")),
    Attack("upload: Content-Range beyond any blob", "", partial(_ranged, "999999999999999999-999999999999999999")),
    Attack("upload: given up", "32 MiB", _cancelled),
    Attack("upload: mounts", "64", partial(_mounts, f"&from={REPO}")),
    Attack("upload: mounts from anywhere", "64", partial(_mounts, "")),
    Attack("upload: mounts from nowhere", "64", partial(_mounts, "&from=none/there")),
]
