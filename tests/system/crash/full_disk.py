"""A real server on a real disk of 24 MiB: `python -m tests.system.crash.full_disk RESULTS_FOLDER`.

Run it in its own mount namespace (`unshare --mount`), because it mounts a tmpfs on FOLDER/data.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import random
import subprocess
import sys
from pathlib import Path

from storage.content import OCI_MANIFEST, digest_of
from tests.fakes.server_process import RegistryServer, running_server

MIB = 1024 * 1024
Answer = tuple[int, bytes, dict[str, str]]


def ask(server: RegistryServer, method: str, path: str, body: bytes = b"", **headers: str) -> Answer:
    """Sends one request on a new connection. A response before the whole body was sent counts as well."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        connection.connect()
        connection.putrequest(method, path)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            connection.putheader(name.replace("_", "-"), value)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, answer.read(), {name.lower(): value for name, value in answer.getheaders()}
    finally:
        connection.close()


def start(server: RegistryServer, repo: str) -> str:
    status, _, headers = ask(server, "POST", f"/v2/{repo}/blobs/uploads/")
    assert status == 202, status
    return headers["location"]


def push(server: RegistryServer, repo: str, body: bytes) -> Answer:
    """Sends a POST, and then one PUT with the whole body."""
    location = start(server, repo)
    joined = location + ("&" if "?" in location else "?")
    return ask(server, "PUT", f"{joined}digest=sha256:{hashlib.sha256(body).hexdigest()}", body)


def pull(server: RegistryServer, repo: str, body: bytes) -> bytes | None:
    status, got, _ = ask(server, "GET", f"/v2/{repo}/blobs/sha256:{hashlib.sha256(body).hexdigest()}")
    return got if status == 200 else None


def free(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def assert_storage_full(answer: Answer) -> None:
    status, body, headers = answer
    assert status == 507, answer
    assert headers["content-type"] == "application/json", headers
    assert [error["code"] for error in json.loads(body)["errors"]] == ["STORAGE_FULL"]


def main(folder: Path) -> None:
    data = folder / "data"
    data.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(data)], check=True)
    with running_server(folder, workers=2) as server:
        small, large = random.Random(1).randbytes(50_000), random.Random(2).randbytes(40 * MIB)
        assert push(server, "team/app", small)[0] == 201
        before = free(data)
        _whole(server, large, data, before)
        _in_chunks(server, large, data, before)
        after = random.Random(3).randbytes(3 * MIB)
        assert push(server, "team/app", after)[0] == 201
        assert pull(server, "team/app", after) == after
        _metadata(server, data, small)
        assert pull(server, "team/app", small) == small
        assert "Traceback" not in server.log_text(), server.log_text()


def _whole(server: RegistryServer, large: bytes, data: Path, before: int) -> None:
    """Pushes one body that is larger than the disk."""
    assert_storage_full(push(server, "team/app", large))
    assert before - free(data) < MIB, "the refused push still takes room"
    assert pull(server, "team/app", large) is None


def _in_chunks(server: RegistryServer, large: bytes, data: Path, before: int) -> None:
    """Pushes chunks until the disk is full."""
    location = start(server, "team/app")
    for at in range(0, len(large), 2 * MIB):
        chunk = large[at : at + 2 * MIB]
        answer = ask(server, "PATCH", location, chunk, Content_Range=f"{at}-{at + len(chunk) - 1}")
        if answer[0] != 202:
            break
        location = answer[2]["location"]
    assert_storage_full(answer)
    assert at >= 16 * MIB, "the disk was not full yet"
    assert before - free(data) < MIB, "the refused upload still takes room"


def _metadata(server: RegistryServer, data: Path, config: bytes) -> None:
    """If there is no room for the database, a manifest is refused. Once there is room, it can be pushed."""
    part = {"mediaType": "application/json", "digest": digest_of(config), "size": len(config)}
    body = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": part,
            "layers": [],
            "annotations": {"a": "x" * 3 * MIB},
        }
    ).encode()
    filler = data / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"\1" * 65536):
            pass
    assert_storage_full(ask(server, "PUT", "/v2/team/app/manifests/1", body, Content_Type=OCI_MANIFEST))
    assert ask(server, "GET", "/v2/team/app/manifests/1")[0] == 404
    assert_storage_full(ask(server, "PUT", "/v2/team/app/manifests/1", body, Content_Type=OCI_MANIFEST))
    assert pull(server, "team/app", config) == config, "a full disk does not keep anybody from reading"
    filler.unlink()
    assert ask(server, "PUT", "/v2/team/app/manifests/1", body, Content_Type=OCI_MANIFEST)[0] == 201
    assert ask(server, "GET", "/v2/team/app/manifests/1")[1] == body


if __name__ == "__main__":
    main(Path(sys.argv[1]))
