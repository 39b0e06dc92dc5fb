"""A test that kills a server with SIGKILL while it scrubs (reads all blobs to find damage). The next server continues
the job at the same place."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.client_images import MIB
from tests.fakes.mirror_site import wait_until
from tests.fakes.plain_client import plain_client
from tests.fakes.raw_http import RawConnection
from tests.fakes.raw_pushes import RawPushes
from tests.fakes.server_process import RegistryServer, running_server, start_server

SIZES = [100] * 3 + [16 * MIB] + [100] * 8
"""The sizes of the blobs in bytes, in the order in which they are pushed and scrubbed."""
SLOW = {"ENTREPOT_SCRUB__RATE": "320KiB"}
"""A limit of the scrub with which it needs almost a minute for the large blob, so that it is killed there."""


def api(server: RegistryServer, method: str, path: str, body: object | None = None) -> Any:
    with plain_client(f"{server.url}/api/v1", timeout=60) as client:
        answer = client.request(method, path, json=body)
    assert answer.is_success, answer.text
    return answer.json()


def scrub_round(server: RegistryServer) -> Any:
    """Returns the state of the newest round of scrub, with the number of blobs read so far."""
    rounds = api(server, "GET", "/scrub")["rounds"]
    return rounds[0] if rounds else {"blobs": 0}


@pytest.mark.slow
def test_next_server_continues_the_scrub(tmp_path: Path) -> None:
    """After the restart, the same job completes the same round of scrub, and counts each blob once."""
    server = start_server(tmp_path, env=SLOW)
    try:
        with closing(RawConnection(("127.0.0.1", server.port))) as connection:
            push = RawPushes(connection, "team/app")
            for number, size in enumerate(SIZES):
                push.blob(bytes([number]) * size)
        job = api(server, "POST", "/scrub", {})
        wait_until(lambda: scrub_round(server)["blobs"] == 3, "no progress is saved")
        round_before = scrub_round(server)
        assert round_before["ended"] is None
    finally:
        server.kill()
    with running_server(tmp_path) as server:
        wait_until(lambda: api(server, "GET", f"/jobs/{job['id']}")["ended"], "the job does not end")
        ended = api(server, "GET", f"/jobs/{job['id']}")
        assert (ended["state"], ended["result"]["blobs"]) == ("done", len(SIZES))
        [finished_round] = api(server, "GET", "/scrub")["rounds"]
        assert (finished_round["id"], finished_round["started"], finished_round["blobs"]) == (
            round_before["id"],
            round_before["started"],
            len(SIZES),
        )
