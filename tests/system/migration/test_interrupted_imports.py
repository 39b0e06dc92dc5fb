"""Tests of imports from other registries: imports that are killed, several imports at the same time, and imports that a
server runs as jobs."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from registry.small_files import MAX_FILE_BYTES
from storage.composition import list_partials
from tests.fakes.client_images import MIB
from tests.fakes.clients.registry_client import RegistryClient
from tests.fakes.commands import (
    command_environment,
    entrepot,
    entrepot_output,
    error_line,
    json_lines,
    wait_for_output,
)
from tests.fakes.forked_process import ForkedProcess
from tests.fakes.hub.hub import Hub, hub
from tests.fakes.killed_command import killing_site
from tests.fakes.old_directory import OldDirectory
from tests.fakes.real_upstreams import docker_registry
from tests.fakes.same_content import assert_same_content
from tests.fakes.server_process import running_server
from tests.fakes.upstream_content import UpstreamContent, index_of, noise_image

PUBLISHING_FUNCTIONS = (
    "storage.blobs.files.linked_file:LinkedFile._publish",
    "storage.blobs.files.process_partial:ProcessPartial.publish",
    "storage.blobs.files.upload_file:UploadFile.publish",
)
"""The functions that store the complete file of a blob."""


@pytest.fixture
def content() -> UpstreamContent:
    """Images of all kinds in three repositories, some of which share layers."""
    images = UpstreamContent()
    for number in range(12):
        amd64 = noise_image(f"amd64 {number // 2}", 300_000, docker=True)
        arm64 = noise_image(f"arm64 {number}", 1000, 400_000)
        image = index_of((amd64, "amd64"), (arm64, "arm64"), docker=bool(number % 2))
        images.add(f"team/app-{number % 3}", image, str(number), "latest")
    return images


def start(*args: str | Path, folder: Path) -> ForkedProcess:
    """Starts an `entrepot` command in the background."""
    return ForkedProcess("registry", *map(str, args), cwd=folder, env=command_environment())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["links", "copies", "network"])
def test_import_continues_after_several_kills(tmp_path: Path, content: UpstreamContent, method: str) -> None:
    """An import is killed several times while it stores blobs, and each next import continues. In the end, all content
    is imported, and no partial files are left."""
    data = tmp_path / "data"
    with docker_registry(tmp_path, content) as old, running_server(tmp_path) as server:
        source = old.url if method == "network" else old.log.parent / "data"
        command = ["import" if method == "network" else "import-registry", source, "--data", data]
        command += ["--copy"] if method == "copies" else []
        for count in (1, 8, 11, 11):
            site = killing_site(tmp_path, count, *PUBLISHING_FUNCTIONS)
            assert entrepot(*command, folder=tmp_path, site=site).returncode == -signal.SIGKILL
        result = json.loads(entrepot_output(*map(str, command), "--json", folder=tmp_path).splitlines()[-1])
        assert result["problems"] == 0
        assert assert_same_content(RegistryClient(old.address), RegistryClient(server.address)) > 30
        # A download has two files. A kill between their deletions leaves one, which `entrepot gc` deletes.
        entrepot_output("gc", "--data", str(data), folder=tmp_path, ENTREPOT_UPLOADS__EXPIRE="1ms")
        assert list((data / "partials").iterdir()) == []
        jobs = json.loads(entrepot_output("jobs", "list", "--json", "--data", str(data), folder=tmp_path))
        # The two newest jobs are `entrepot gc` and the last import. The jobs of killed processes have failed, except a
        # job that was done just before its process was killed.
        assert [job["state"] for job in jobs[:2]] == ["done", "done"]
        killed = [job["message"] for job in jobs[2:] if job["state"] != "done"]
        assert killed
        assert set(killed) == {"the process that ran it has ended"}


def test_bytes_of_a_killed_download_are_reused(tmp_path: Path) -> None:
    """An import is killed in the middle of a large blob. The next import does not fetch the bytes again that have
    already arrived."""
    content = UpstreamContent()
    image = content.add("team/app", noise_image("large", 24 * MIB), "1")
    layer = image.layers[0].digest
    names = tmp_path / "names"
    names.write_text("# the repositories to move\nteam/app\n")
    data = tmp_path / "data"
    with hub(tmp_path, content) as old:
        old.fault(on="blob", match=layer, stall_after=6 * MIB, times=None)
        command = ("import", old.url, "--repositories", names, "--data", data)
        with start(*command, folder=tmp_path) as process:
            old.until(lambda: received_bytes(data, layer) >= 6 * MIB)
            process.kill()
            wait_for_output(process)
        assert process.returncode == -signal.SIGKILL
        received = received_bytes(data, layer)
        old.clear()
        old.forget()
        entrepot_output(*map(str, command), folder=tmp_path)
        assert sum(stop - start_offset for start_offset, stop in old.sent_ranges(layer)) == 24 * MIB - received
    with running_server(tmp_path) as server:
        assert RegistryClient(server.address).blob("team/app", layer) == image.layers[0].read()


def received_bytes(data: Path, digest: str) -> int:
    """Returns how many bytes of a blob are recorded as received; 0 if no download of the blob is unfinished."""
    partials = list_partials(data) if (data / "partials").exists() else []
    return sum(partial.received for partial in partials if partial.digest == digest)


@pytest.fixture
def stalling(tmp_path: Path) -> Iterator[Hub]:
    """A registry whose responses to blob requests wait until the test calls `release`."""
    content = UpstreamContent()
    content.add("team/app", noise_image("image", 10), "1")
    with hub(tmp_path, content) as running:
        running.fault(on="blob", stall=True, times=None)
        yield running


def test_second_import_at_the_same_time_is_refused(tmp_path: Path, stalling: Hub) -> None:
    """A second import command at the same time fails. Its message names the running job and how to stop it. The first
    import is not affected."""
    (tmp_path / "names").write_text("team/app\n")
    command = ("import", stalling.url, "--repositories", "names", "--data", "data")
    with start(*command, folder=tmp_path) as first:
        stalling.wait(1, "blob")
        message = error_line(entrepot(*command, folder=tmp_path), 1)
        # In parentheses, the message names the job's id and what runs the job: a command, and its process id.
        assert "is running import-remote already (job 1, command, process " in message
        assert "entrepot jobs stop 1" in message
        stalling.clear()
        stalling.release()
        out, err = wait_for_output(first)
    assert (first.returncode, err) == (0, "")
    assert "tags: 1 imported" in out


def test_ctrl_c_ends_an_import(tmp_path: Path, stalling: Hub) -> None:
    """Ctrl-C ends an import immediately, and its job is marked as stopped. The next import continues."""
    (tmp_path / "names").write_text("team/app\n")
    command = ("import", stalling.url, "--repositories", "names", "--data", "data")
    with start(*command, folder=tmp_path) as first:
        stalling.wait(1, "blob")
        first.send_signal(signal.SIGINT)
        wait_for_output(first)
    assert first.returncode == 130
    [job] = json.loads(entrepot_output("jobs", "list", "--json", "--data", "data", folder=tmp_path))
    assert (job["state"], job["message"]) == ("stopped", "it was interrupted")
    stalling.clear()
    stalling.release()
    assert "tags: 1 imported" in entrepot_output(*command, folder=tmp_path)


def test_import_by_the_api(tmp_path: Path) -> None:
    """A request to the API queues an import job, which a worker of the server runs. An invalid request gets an error
    that explains the problem."""
    old = OldDirectory(tmp_path / "old")
    image = old.push("team/app", noise_image("image", 1000), "1")
    broken = old.push("team/app", noise_image("broken", 1000), "broken")
    old.data(broken.layers[0].digest).unlink()
    with running_server(tmp_path) as server:
        wire = RegistryClient(server.address)

        def post(path: str, body: object) -> tuple[int, Any]:
            headers = {"Content-Type": "application/json"}
            reply = wire.ask("POST", f"/api/v1/imports/{path}", json.dumps(body).encode(), headers)
            return reply.status, reply.json()

        status, refusal = post("directory", {"path": str(tmp_path)})
        assert (status, refusal["errors"][0]["code"]) == (400, "IMPORT_INVALID")
        assert "is no registry" in refusal["errors"][0]["message"]
        status, refusal = post("directory", {"path": "old"})
        assert (status, refusal["errors"][0]["message"]) == (400, "old is not an absolute path")
        status, refusal = post("remote", {"url": "http://x:5000"})
        assert (status, refusal["errors"][0]["code"]) == (400, "IMPORT_INVALID")
        assert "is not an endpoint of an [[upstream]] in the settings" in refusal["errors"][0]["message"]

        status, job = post("directory", {"path": str(old.path), "copy": True})
        assert (status, job["kind"], job["arguments"]["copy"]) == (202, "import-registry", True)
        while job["ended"] is None:
            time.sleep(0.05)
            job = wire.ask("GET", f"/api/v1/jobs/{job['id']}").json()
        assert (job["state"], job["result"]["tags"], job["result"]["linked"]) == ("done", 1, 0)
        assert job["result"]["copied"] >= 2
        assert job["result"]["listed_problems"] == [
            {
                "repository": "team/app",
                "tag": "broken",
                "digest": broken.digest,
                "reason": f"the file of the blob {broken.layers[0].digest} is missing",
            }
        ]
        assert wire.manifest("team/app", "1").body == image.body


def test_output_of_the_import_command(tmp_path: Path) -> None:
    """The command prints each problem as a line on stderr and a summary on stdout. If there is a problem, its exit code
    is 1."""
    old = OldDirectory(tmp_path / "old")
    old.push("team/app", noise_image("image", 1000), "1")
    broken = old.push("team/app", noise_image("broken", 1000), "broken")
    old.data(broken.layers[0].digest).unlink()
    process = entrepot("import-registry", "old", folder=tmp_path)
    assert process.returncode == 1
    reason = f"the file of the blob {broken.layers[0].digest} is missing"
    assert process.stderr.splitlines()[0] == f"problem: team/app:broken: {reason}"
    assert process.stdout.splitlines()[0] == "repositories: 1; tags: 1 imported, 0 unchanged"
    assert process.stdout.splitlines()[-1] == "1 problem: the lines above say what could not be imported"

    old.push("team/app", noise_image("image", 1000), "2")
    lines = json_lines(entrepot("import-registry", "old", "--json", folder=tmp_path).stdout)
    assert [line["event"] for line in lines if line["event"] != "note"] == ["imported", "problem", "done"]

    for args, reason in (
        (("import-registry", "none"), "is no directory"),
        (("import", "file.tar"), "there is no file or directory file.tar"),
        (("import", "http://127.0.0.1:1", "--include", "a b"), "is not a pattern of names"),
        (("import", "http://127.0.0.1:1", "--repositories", "none"), "cannot be read: No such file or directory"),
    ):
        assert reason in error_line(entrepot(*args, folder=tmp_path), 1)
    for args, reason in ((("import", "http://127.0.0.1:1", "--username", "ann"), "belong together"),):
        assert reason in error_line(entrepot(*args, folder=tmp_path), 2)


def test_settings_are_translated(tmp_path: Path) -> None:
    """`entrepot import-config` translates the settings of the distribution registry from a file, stdin and
    variables."""
    (tmp_path / "config.yml").write_text("version: 0.1\nhttp: {addr: ':5000'}\n")
    out = entrepot_output("import-config", "config.yml", folder=tmp_path, REGISTRY_LOG_LEVEL="warn")
    assert 'log_level = "warning"' in out
    assert entrepot_output("import-config", "-", folder=tmp_path, stdin_text="log: {level: error}").endswith(
        '"error"\n'
    )
    assert "is not YAML" in error_line(entrepot("import-config", "-", folder=tmp_path, stdin_text="{"), 1)
    too_large = "# " + "\u00e4" * (MAX_FILE_BYTES // 2)  # fewer characters than bytes
    assert "larger than" in error_line(entrepot("import-config", "-", folder=tmp_path, stdin_text=too_large), 1)
    assert "cannot be read" in error_line(entrepot("import-config", "none", folder=tmp_path), 1)
