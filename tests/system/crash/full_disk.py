"""Fills the disk of a running server with pushes, and checks its responses: `python -m tests.system.crash.full_disk
FOLDER`.

Run this program in its own mount namespace (`unshare --mount`), because it mounts a tmpfs of 24 MiB on FOLDER/data.
Other crash tests use its functions for requests.
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
from tests.fakes.process_resources import eventually
from tests.fakes.server_process import RegistryServer, running_server

MIB = 1024 * 1024
Answer = tuple[int, bytes, dict[str, str]]
"""A response: its status, body and headers."""


def ask(server: RegistryServer, method: str, path: str, body: bytes = b"", **headers: str) -> Answer:
    """Sends one request on a new connection, and returns the response. The server may send the response before it has
    read the whole body."""
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
    """Starts an upload session. Returns its location."""
    status, _, headers = ask(server, "POST", f"/v2/{repo}/blobs/uploads/")
    assert status == 202, status
    return headers["location"]


def push(server: RegistryServer, repo: str, body: bytes) -> Answer:
    """Pushes a blob: sends a POST, and then one PUT with the whole body."""
    location = start(server, repo)
    joined = location + ("&" if "?" in location else "?")
    return ask(server, "PUT", f"{joined}digest=sha256:{hashlib.sha256(body).hexdigest()}", body)


def pull(server: RegistryServer, repo: str, body: bytes) -> bytes | None:
    """Pulls the blob that was pushed with this body. Returns None if the status is not 200."""
    status, pulled_body, _ = ask(server, "GET", f"/v2/{repo}/blobs/sha256:{hashlib.sha256(body).hexdigest()}")
    return pulled_body if status == 200 else None


def free_bytes(folder: Path) -> int:
    """Returns the number of free bytes on the disk."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def assert_space_is_freed(folder: Path, free_before: int) -> None:
    """Checks that a refused push takes no space on the disk soon after its response. A thread may still have to close
    the file that an earlier request of the same upload has written."""
    assert eventually(lambda: free_before - free_bytes(folder) < MIB), "the refused push still takes space"


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
        free_before = free_bytes(data)
        _push_in_one_body(server, large, data, free_before)
        _push_in_chunks(server, large, data, free_before)
        small_enough = random.Random(3).randbytes(3 * MIB)
        assert push(server, "team/app", small_enough)[0] == 201
        assert pull(server, "team/app", small_enough) == small_enough
        _push_manifest(server, data, small)
        assert pull(server, "team/app", small) == small
        assert "Traceback" not in server.log_text(), server.log_text()


def _push_in_one_body(server: RegistryServer, large: bytes, data: Path, free_before: int) -> None:
    """Checks that a body larger than the disk is refused, and that its space is freed."""
    assert_storage_full(push(server, "team/app", large))
    assert_space_is_freed(data, free_before)
    assert pull(server, "team/app", large) is None


def _push_in_chunks(server: RegistryServer, large: bytes, data: Path, free_before: int) -> None:
    """Pushes chunks until the disk is full. Checks that the space of the upload is then freed."""
    location = start(server, "team/app")
    for at in range(0, len(large), 2 * MIB):
        chunk = large[at : at + 2 * MIB]
        answer = ask(server, "PATCH", location, chunk, Content_Range=f"{at}-{at + len(chunk) - 1}")
        if answer[0] != 202:
            break
        location = answer[2]["location"]
    assert_storage_full(answer)
    assert at >= 16 * MIB, "the disk was not full yet"
    assert_space_is_freed(data, free_before)


def _push_manifest(server: RegistryServer, data: Path, config: bytes) -> None:
    """Checks that a manifest is refused if there is no space for the database, and accepted once there is space."""
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
    # The first refusal must not have changed anything, so a second try gets the same error.
    assert_storage_full(ask(server, "PUT", "/v2/team/app/manifests/1", body, Content_Type=OCI_MANIFEST))
    assert pull(server, "team/app", config) == config, "a full disk must not prevent reads"
    filler.unlink()
    assert ask(server, "PUT", "/v2/team/app/manifests/1", body, Content_Type=OCI_MANIFEST)[0] == 201
    assert ask(server, "GET", "/v2/team/app/manifests/1")[1] == body


if __name__ == "__main__":
    main(Path(sys.argv[1]))
