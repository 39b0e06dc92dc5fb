"""Tests of `entrepot gc` and `entrepot fsck` (garbage collection, and the check of the store), and of the same jobs by
the API, while a server runs."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from storage.composition import open_registry, prepare_data_dir
from storage.jobs import slot_name
from storage.names import RepositoryName
from storage.upkeep.collection_job import GC
from tests.fakes.commands import command_environment, entrepot, entrepot_output, error_line, json_lines
from tests.fakes.plain_client import plain_request
from tests.fakes.raw_pushes import OCI_MANIFEST, digest_of, image
from tests.fakes.registry_content import push_blob
from tests.fakes.server_process import RegistryServer, running_server

NO_GRACE = {"ENTREPOT_GC__GRACE": "0s"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryServer]:
    """Runs a server without a grace period. It collects garbage once an hour, so never by itself during a test."""
    with running_server(tmp_path_factory.mktemp("upkeep"), workers=2, env=NO_GRACE) as started:
        yield started


def push(server: RegistryServer, repo: str, tag: str, *blobs: bytes) -> str:
    """Pushes an image with a config and layers, and returns its digest."""
    for blob in blobs:
        url = f"{server.url}/v2/{repo}/blobs/uploads/?digest={digest_of(blob)}"
        assert plain_request("POST", url, content=blob).status_code == 201
    body = image(*blobs)
    url = f"{server.url}/v2/{repo}/manifests/{tag}"
    assert plain_request("PUT", url, content=body, headers={"content-type": OCI_MANIFEST}).status_code == 201
    return digest_of(body)


def pulls(server: RegistryServer, repo: str, blob: bytes) -> bool:
    """Returns whether the blob can be pulled with the right bytes."""
    answer = plain_request("GET", f"{server.url}/v2/{repo}/blobs/{digest_of(blob)}")
    assert answer.status_code in (200, 404, 500)
    return answer.content == blob


def lines(*args: str, server: RegistryServer, code: int = 0) -> list[dict[str, Any]]:
    """Runs a command with --json, and returns its JSON lines. The last line is the result, the others are the steps."""
    completed = entrepot(*args, "--json", folder=server.data.parent, **NO_GRACE)
    assert completed.returncode == code, completed.stderr
    return json_lines(completed.stdout)


def blob_file(server: RegistryServer, blob: bytes) -> Path:
    """Returns the path of the file of this blob."""
    digest = digest_of(blob).removeprefix("sha256:")
    return server.data / "blobs" / "sha256" / digest[:2] / digest


def test_gc_while_a_server_runs(server: RegistryServer) -> None:
    """A dry run lists the garbage that a run would remove, with the number of bytes. A run removes this garbage and
    prints the reasons, and the server no longer has it. Content in use stays."""
    push(server, "gc/app", "kept", b"config of kept", b"layer of both")
    deleted = push(server, "gc/app", "gone", b"config of gone", b"layer of both")
    assert plain_request("DELETE", f"{server.url}/v2/gc/app/manifests/{deleted}").status_code == 202

    *planned, preview = lines("gc", "--dry-run", server=server)
    assert pulls(server, "gc/app", b"config of gone")
    output = entrepot_output("gc", folder=server.data.parent, **NO_GRACE)

    config = digest_of(b"config of gone")
    found = {(step["kind"], step["repository"], step["item"]): step["bytes"] for step in planned}
    assert found[("link", "gc/app", config)] == 0
    assert found[("blob", None, config)] == len(b"config of gone")
    assert digest_of(b"layer of both") not in {step["item"] for step in planned}
    assert {step["event"] for step in planned} == {"would be removed"}
    assert preview["totals"]["blob"] == {"count": 1, "bytes": len(b"config of gone")}
    assert f"removed link {config} of gc/app: no manifest of gc/app has referred to it since " in output
    assert f"removed blob {config} (14 B): no repository has it any more\n" in output
    assert output.endswith(" freed\n")
    assert not pulls(server, "gc/app", b"config of gone")
    assert pulls(server, "gc/app", b"layer of both")
    assert lines("gc", server=server)[-1]["bytes"] == 0


def strays_found(result: dict[str, Any]) -> int:
    """Returns the number of stray files (files of blobs that the database does not have) in the result of a run."""
    count = result["totals"]["stray"]["count"]
    assert isinstance(count, int)
    return count


def test_gc_with_strays_lists_all_directories(server: RegistryServer) -> None:
    """By default, a run looks for stray files in a part of the directories only, so that it stays cheap in a large
    store. With --strays, it looks in all directories."""
    strays = [f"stray {number}".encode() for number in range(64)]
    for blob in strays:
        blob_file(server, blob).parent.mkdir(parents=True, exist_ok=True)
        blob_file(server, blob).write_bytes(blob)
        os.utime(blob_file(server, blob), (0, 0))
    assert strays_found(lines("gc", "--dry-run", server=server)[-1]) < len(strays)
    assert strays_found(job_of(server, "gc", {"dry_run": True})["result"]) < len(strays)
    assert strays_found(lines("gc", "--dry-run", "--strays", server=server)[-1]) == len(strays)
    assert strays_found(job_of(server, "gc", {"strays": True})["result"]) == len(strays)
    assert not any(blob_file(server, blob).exists() for blob in strays)


def test_push_replaces_a_blob_that_fsck_found_missing(server: RegistryServer) -> None:
    """`fsck` exits with 1 if the file of a blob is missing. `fsck --repair` records the blob as damaged. The next push
    then stores the blob again, and `fsck` finds nothing wrong."""
    blobs = b"config of damaged", b"layer of damaged"
    push(server, "fsck/app", "latest", *blobs)
    assert lines("fsck", "--hash", server=server) == [
        {"event": "done", "found": {}, "repaired": 0, "left": 0, "damaged": 0},
    ]
    blob_file(server, blobs[1]).unlink()

    completed = entrepot("fsck", folder=server.data.parent)
    assert completed.returncode == 1
    problem, summary = completed.stdout.splitlines()
    assert problem.startswith(f"blob-bytes-missing: {digest_of(blobs[1])}: the bytes of the blob are missing; ")
    assert summary == "1 problem; to repair what can be repaired, run `entrepot fsck --repair`"

    step, result = lines("fsck", "--repair", server=server)
    assert (step["event"], step["code"], step["item"]) == ("problem", "blob-bytes-missing", digest_of(blobs[1]))
    assert step["repair"].startswith("recorded the blob as damaged")
    found = {"found": {"blob-bytes-missing": 1}, "repaired": 1, "left": 0, "damaged": 1}
    assert result == {"event": "done", **found}
    push(server, "fsck/app", "latest", *blobs)
    assert pulls(server, "fsck/app", blobs[1])
    assert entrepot_output("fsck", folder=server.data.parent).startswith("nothing is wrong")


def job_of(server: RegistryServer, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Starts a job by the API, waits for its end, and returns it."""
    started = plain_request("POST", f"{server.url}/api/v1/{path}", json=body)
    assert started.status_code == 202, started.text
    while True:
        job: dict[str, Any] = plain_request("GET", f"{server.url}/api/v1/jobs/{started.json()['id']}").json()
        if job["ended"] is not None:
            return job


def test_gc_and_fsck_by_the_api(server: RegistryServer) -> None:
    """The API starts garbage collection and the check as jobs. The result of a job has the totals and the records of
    the removed content."""
    deleted = push(server, "api/app", "gone", b"config by api", b"layer by api")
    assert plain_request("DELETE", f"{server.url}/v2/api/app/manifests/{deleted}").status_code == 202
    preview = job_of(server, "gc", {"dry_run": True})
    assert (preview["kind"], preview["state"], preview["message"]) == ("gc", "done", "")
    assert {record["item"] for record in preview["result"]["records"]} >= {digest_of(b"layer by api")}
    collected = job_of(server, "gc", {})
    assert collected["result"]["totals"] == preview["result"]["totals"]
    checked = job_of(server, "fsck", {"hash": True, "repair": True})
    assert (checked["result"]["found"], checked["result"]["left"]) == ({}, 0)
    assert plain_request("POST", f"{server.url}/api/v1/gc", json={"dry": True}).status_code == 422


async def test_second_gc_names_the_running_one(server: RegistryServer) -> None:
    """While `gc` runs, a second `gc` fails with exit code 1 and one line that says who started the running one."""
    async with (
        open_registry(server.data) as registry,
        registry.leases.try_slot(slot_name(GC), count=1),
    ):
        job = await registry.jobs.add(GC, {}, actor="cli:alice", holder="command, process 7")
        error = error_line(entrepot("gc", folder=server.data.parent), 1)
        await registry.jobs.request_stop(job.id)
    assert error.startswith(f"cli:alice is running gc already (job {job.id}, command, process 7); to watch it, run ")


async def push_blobs(data: Path, number: int) -> None:
    """Pushes `number` blobs to which no manifest refers."""
    prepare_data_dir(data)
    async with open_registry(data) as registry:
        for content in range(number):
            await push_blob(registry, RepositoryName("team/app"), str(content).encode())


def blob_files(data: Path) -> list[Path]:
    return [path for path in (data / "blobs").rglob("*") if path.is_file()]


def test_next_gc_completes_a_killed_one(tmp_path: Path) -> None:
    """`gc` is killed after it has removed one item, and once more after 85 items. Each time, `fsck` finds nothing
    wrong. The next run removes the rest of the garbage."""
    asyncio.run(push_blobs(tmp_path / "data", 80))
    command = [sys.executable, "-m", "registry", "gc", "--json"]
    environment = command_environment(**NO_GRACE)
    for removals in (1, 85):  # `gc` removes the 80 links first, and then the blobs
        with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            # `gc` waits when the pipe is full. So it can be at most about 50 items ahead when it is killed.
            fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 4096)
            for _ in range(removals):
                assert json.loads(process.stdout.readline())["event"] == "removed"
            process.kill()
        assert process.returncode == -signal.SIGKILL
        assert entrepot_output("fsck", folder=tmp_path) == "nothing is wrong\n"
    # A blob whose database row was removed before the kill is a stray file. Only old stray files are removed.
    for path in blob_files(tmp_path / "data"):
        os.utime(path, (0, 0))
    entrepot_output("gc", "--strays", folder=tmp_path, **NO_GRACE)
    assert blob_files(tmp_path / "data") == []
    assert entrepot_output("fsck", folder=tmp_path) == "nothing is wrong\n"
    jobs = json.loads(entrepot_output("jobs", "list", "--kind", "gc", "--json", folder=tmp_path))
    assert jobs[-1]["message"] == "the process that ran it has ended"
