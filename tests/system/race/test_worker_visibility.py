"""Tests of a server with two workers: each worker sees the changes of the other worker at once, and closes its files
after a client has disconnected."""

from __future__ import annotations

import http.client
import json
import os
import random
import re
from pathlib import Path

from storage.content import OCI_MANIFEST, digest_of
from tests.fakes.server_process import RegistryServer, running_server
from tests.system.crash.full_disk import ask, pull, push
from tests.system.server.app_process import wait_for

MIB = 1024 * 1024


def _count_open_files(server: RegistryServer) -> int:
    """Returns how many files of blobs and upload sessions the workers have open."""
    count = 0
    for pid in server.worker_pids():
        for fd in os.listdir(f"/proc/{pid}/fd"):
            try:
                target = os.readlink(f"/proc/{pid}/fd/{fd}")
            except FileNotFoundError:
                continue
            count += f"{server.data}/blobs" in target or f"{server.data}/uploads" in target
    return count


def test_disconnected_readers_leave_no_open_file(tmp_path: Path) -> None:
    """Thirty clients disconnect in the middle of a blob. The server closes its files, and then still serves the
    blob."""
    body = random.Random(1).randbytes(30 * MIB)
    with running_server(tmp_path, workers=2) as server:
        assert push(server, "team/app", body)[0] == 201
        for _ in range(30):
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
            connection.request("GET", f"/v2/team/app/blobs/{digest_of(body)}")
            assert connection.getresponse().read(100_000) == body[:100_000]
            connection.close()
        wait_for(lambda: _count_open_files(server) == 0)
        assert pull(server, "team/app", body) == body


def _workers(server: RegistryServer) -> set[str]:
    """Returns the process ids of the workers that have logged requests."""
    return set(re.findall(r"registry\.access\[(\d+)\]", server.log_text()))


def test_moved_tag_is_visible_to_every_worker_at_once(tmp_path: Path) -> None:
    """Each PUT of a tag is visible to the next GET and the next HEAD, whichever worker serves them. After the DELETE of
    the tag, each GET gets 404."""
    with running_server(tmp_path, workers=2) as server:
        config = b"{}"
        assert push(server, "team/app", config)[0] == 201
        part = {"mediaType": "application/json", "digest": digest_of(config), "size": 2}
        number = 0
        while number < 60 or len(_workers(server)) < 2:
            number += 1
            assert number < 5000, "the test did not reach both workers"
            document = {"schemaVersion": 2, "config": part, "layers": [], "annotations": {"n": str(number)}}
            body = json.dumps(document).encode()
            path = "/v2/team/app/manifests/moving"
            assert ask(server, "PUT", path, body, Content_Type=OCI_MANIFEST)[0] == 201
            assert ask(server, "GET", path)[1] == body
            assert ask(server, "HEAD", path)[2]["docker-content-digest"] == digest_of(body)
        assert ask(server, "DELETE", "/v2/team/app/manifests/moving")[0] == 202
        assert [ask(server, "GET", path)[0] for _ in range(6)] == [404] * 6
