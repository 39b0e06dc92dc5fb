"""A test that records the system calls of a push with strace. The bytes and the metadata are synced to the disk before
the client gets the response."""

from __future__ import annotations

import http.client
import re
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from storage.data_dir.layout import Layout
from storage.names import Digest
from tests.fakes.client_images import MIB, ClientImage, image, layer, noise
from tests.fakes.clients.registry_client import RegistryClient, assert_same_image
from tests.fakes.clients.strace import SystemCall, tracing
from tests.fakes.server_process import RegistryServer, running_server

# The names of the system calls that sync a file, rename a file, and send a response.
FSYNC = {"fsync", "fdatasync"}
RENAME = {"rename", "renameat", "renameat2"}
SEND = {"write", "writev", "sendto", "sendmsg"}


def first(steps: list[SystemCall], description: str, after_line: int, fits: Callable[[SystemCall], bool]) -> SystemCall:
    """Returns the first successful system call that began after line `after_line` of the trace and for which `fits`
    returns True. If there is none, raises AssertionError with the trace. `description`: a description of the system
    call, for this error."""
    for step in steps:
        if step.began > after_line and step.worked and fits(step):
            return step
    record = "\n".join(f"{step.began}-{step.ended} {step.text[:200]}" for step in steps if step.began > after_line)
    raise AssertionError(f"no {description} after line {after_line}:\n{record}")


def answers(steps: list[SystemCall], status: int) -> list[SystemCall]:
    """Returns the system calls that send a response with this status."""
    return [step for step in steps if step.name in SEND and f'"HTTP/1.1 {status} ' in step.text]


def paths_of(rename: SystemCall) -> tuple[Path, Path]:
    """Returns the source and the target of a rename. If a path is relative to an open directory, joins it with the path
    of this directory."""
    # strace prints each path as `"PATH"`, or as `7<DIRECTORY>, "PATH"` if it is relative to an open directory.
    found = re.findall(r'(?:(?:AT_FDCWD|\d+)(?:<([^>]*)>)?, )?"([^"]*)"', rename.text)
    source, target = (Path(directory or "/") / path for directory, path in found)
    return source, target


def with_digest(location: str, digest: str) -> str:
    return f"{location}{'&' if '?' in location else '?'}digest={digest}"


def is_wal_sync(step: SystemCall) -> bool:
    return step.name in FSYNC and "-wal>" in step.text


def ask(connection: http.client.HTTPConnection, method: str, path: str, body: bytes, **headers: str) -> str:
    """Sends one request on the open connection, and returns the Location of a 201 or 202."""
    connection.request(method, path, body, headers)
    with connection.getresponse() as reply:
        text = reply.read()
        assert reply.status in (201, 202), (reply.status, text)
        return reply.headers["Location"]


def push_traced(server: RegistryServer, folder: Path, test_image: ClientImage) -> list[SystemCall]:
    """Pushes an image. Uses one connection for its last layer (POST, PATCH, PUT) and its manifest, while strace records
    the system calls of the workers. Returns these calls."""
    wire, last = RegistryClient(server.address), test_image.layers[-1]
    wire.push("team/traced", "before", image("before"))
    assert test_image.config is not None
    for content in (test_image.config, *test_image.layers[:-1]):
        start = wire.ask("POST", "/v2/team/traced/blobs/uploads/").headers["Location"]
        assert wire.ask("PUT", with_digest(start, content.digest), content.body).status == 201
    with (
        tracing(server.worker_pids(), folder) as trace,
        closing(http.client.HTTPConnection(server.address, timeout=60)) as connection,
    ):
        location = ask(connection, "POST", "/v2/team/traced/blobs/uploads/", b"")
        location = ask(connection, "PATCH", location, last.body)
        ask(connection, "PUT", with_digest(location, last.digest), b"")
        headers = {"Content-Type": test_image.manifest.media_type}
        ask(connection, "PUT", "/v2/team/traced/manifests/traced", test_image.manifest.body, **headers)
        # The same thread of the server answers this request. So when the response arrives, the write of the 201 before
        # it has ended, and strace has recorded it completely.
        ask(connection, "POST", "/v2/team/traced/blobs/uploads/", b"")
    return trace.steps()


@pytest.mark.timeout(180)
def test_everything_is_synced_before_the_201(tmp_path: Path) -> None:
    """Before the server sends the 201 for a blob, it syncs the blob's file, renames the file, syncs the directory, and
    syncs the write-ahead log (WAL) of the metadata. Before the 201 for a manifest, it syncs the WAL again."""
    test_image = image("traced", layer({"traced": noise("traced", MIB)}))
    with running_server(tmp_path / "server") as server:
        steps = push_traced(server, tmp_path, test_image)
        assert_same_image(RegistryClient(server.address), "team/traced", "traced", test_image)
    name = test_image.layers[-1].digest.partition(":")[2]
    created_responses = answers(steps, 201)
    assert len(created_responses) == 2, "one 201 for the blob, one for the manifest"
    blob_response, manifest_response = created_responses

    renamed = first(steps, "rename into place", -1, lambda step: step.name in RENAME and name in step.text)
    source, target = paths_of(renamed)
    assert target == Layout(server.data.resolve()).blob(Digest(test_image.layers[-1].digest))
    file_syncs = [s for s in steps if s.name in FSYNC and f"<{source}>" in s.text and s.ended < renamed.began]
    assert file_syncs, f"{source} was renamed without an fsync"
    directory_sync = first(
        steps, "fsync of the directory", renamed.ended, lambda s: s.name == "fsync" and f"<{target.parent}>" in s.text
    )
    blob_commit = first(steps, "fsync of the WAL", directory_sync.ended, is_wal_sync)
    assert blob_commit.ended < blob_response.began
    manifest_commit = first(steps, "fsync of the WAL for the manifest", blob_response.began, is_wal_sync)
    assert manifest_commit.ended < manifest_response.began
