"""Attacks with upload sessions and mounts."""

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
"""The size of a large blob in bytes."""


def _start(site: AttackedSite, query: str = "") -> str:
    """Starts an upload session. Returns its URL."""
    return site.ask("POST", f"/v2/{REPO}/blobs/uploads/{query}").header(b"location")


def _many_patches(site: AttackedSite) -> AttackAnswer:
    """Sends 300 PATCH requests with one byte each on one connection."""
    location = _start(site)
    with attack_requests.connect(site.port) as sock:
        for number in range(300):
            headers = {"Content-Range": f"{number}-{number}"}
            sock.sendall(attack_requests.head("PATCH", location, headers, length=1, keep=True) + b"a")
            if not sock.recv(65536):
                break
        sock.sendall(attack_requests.head("GET", location))
        return attack_requests.read(sock)


def _large_upload(algorithm: str, site: AttackedSite) -> AttackAnswer:
    """Uploads a large blob, and commits it with a digest of `algorithm`. The server has to hash the bytes again if it
    has used another algorithm."""
    piece = random.Random(site.number()).randbytes(MIB)
    location = _start(site)

    def pieces() -> Iterator[bytes]:
        yield attack_requests.head("PATCH", location, length=LARGE)
        for _ in range(LARGE // MIB):
            yield piece

    attack_requests.talk(site.port, pieces())
    digest = hashlib.new(algorithm)
    for _ in range(LARGE // MIB):
        digest.update(piece)
    return site.ask("PUT", f"{location}?digest={algorithm}:{digest.hexdigest()}", body=b"")


def _sessions(site: AttackedSite) -> AttackAnswer:
    """Starts 300 upload sessions on one connection."""
    with attack_requests.connect(site.port) as sock:
        for _ in range(300):
            sock.sendall(attack_requests.head("POST", f"/v2/{REPO}/blobs/uploads/", length=0, keep=True))
            if not sock.recv(65536):
                break
        sock.sendall(attack_requests.head("GET", "/v2/"))
        return attack_requests.read(sock)


def _mounts(source: str, site: AttackedSite) -> AttackAnswer:
    """Sends 64 pipelined mounts of the blob `{}` into a new repository, as many as the server accepts on one
    connection. `source`: the parameter `from` of the query, or an empty text."""
    repo, blob = f"hostile/mounted{site.fresh()}", costly_bodies.EMPTY
    target = f"/v2/{repo}/blobs/uploads/?mount={blob}{source}"
    request_head = attack_requests.head("POST", target, length=0, keep=True)
    return site.talk(request_head * 63 + attack_requests.head("POST", target, length=0))


def _ranged(value: str, site: AttackedSite) -> AttackAnswer:
    """Sends a PATCH with this Content-Range to a new upload session."""
    return site.ask("PATCH", _start(site), {"Content-Range": value}, b"a")


def _dripped(size: int, site: AttackedSite) -> AttackAnswer:
    """Uploads `size` bytes with a declared length, each in a TCP segment of its own."""

    def pieces() -> Iterator[bytes]:
        yield attack_requests.head("PATCH", _start(site), length=size)
        for _ in range(size):
            yield b"a"

    return attack_requests.talk(site.port, pieces())


def _of_length(length: int, site: AttackedSite) -> AttackAnswer:
    """Sends the head of a PATCH with this Content-Length, and one byte of its body."""
    return site.talk(attack_requests.head("PATCH", _start(site), length=length) + b"a")


def _cancelled(site: AttackedSite) -> AttackAnswer:
    """Cancels an upload session with 32 MiB."""
    location = _start(site)
    site.ask("PATCH", location, body=b"a" * (32 * MIB))
    return site.ask("DELETE", location)


ATTACKS = [
    Attack("upload: many small PATCHes", "300", _many_patches),
    Attack("upload: large, closed by sha256", "128 MiB", partial(_large_upload, "sha256")),
    Attack("upload: large, closed by sha512", "128 MiB", partial(_large_upload, "sha512")),
    Attack("upload: many sessions", "300", _sessions),
    Attack("upload: long Content-Range", "31 KiB", partial(_ranged, f"{'9' * 15_000}-{'9' * 15_000}")),
    Attack("upload: Content-Range beyond any blob", "", partial(_ranged, "999999999999999999-999999999999999999")),
    Attack("upload: one byte in each segment", "20,000", partial(_dripped, 20_000)),
    Attack("upload: Content-Length of 2^63", "", partial(_of_length, 2**63)),
    Attack("upload: given up", "32 MiB", _cancelled),
    Attack("upload: mounts", "64", partial(_mounts, f"&from={REPO}")),
    Attack("upload: mounts from anywhere", "64", partial(_mounts, "")),
    Attack("upload: mounts from nowhere", "64", partial(_mounts, "&from=none/there")),
]
