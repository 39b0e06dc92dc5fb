"""Tests of `entrepot backup` and `entrepot restore` while a server runs, and of backups by the API."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.admin_site import ADMIN, PASSWORD, AdminSite, code_of
from tests.fakes.commands import command_environment, entrepot, entrepot_output, error_line, json_lines
from tests.fakes.killed_command import killing_site
from tests.fakes.plain_client import plain_client
from tests.fakes.raw_http import RawConnection
from tests.fakes.raw_pushes import RawPushes, digest_of, image
from tests.fakes.scrub_runs import flip_byte
from tests.fakes.server_process import RegistryServer, running_server

SHORT_GRACE_SETTINGS = {"ENTREPOT_GC__GRACE": "2", "ENTREPOT_GC__INTERVAL": "0.2"}
COMPLETE_FILE = "storage.upkeep.backup.file_copies:FileCopier._move"
"""The function that completes the file of a blob, in a backup or a restored data directory."""


def push(server: RegistryServer, repo: str, tag: str, size: int = 100_000) -> tuple[str, bytes]:
    """Pushes an image that no other test pushes. Returns the path of its manifest, and its bytes."""
    with RawConnection(("127.0.0.1", server.port)) as wire:
        pushes = RawPushes(wire, repo)
        config, layer = os.urandom(2000), os.urandom(size)
        pushes.blob(config)
        pushes.blob(layer)
        body = image(config, layer)
        return pushes.manifest(body, tag), body


def check_image(server: RegistryServer, path: str, body: bytes) -> None:
    """Checks that the server has the manifest, and every blob of it with the right bytes."""
    root = path.partition("/manifests/")[0]
    with plain_client(server.url) as client:
        assert client.get(path).content == body
        document = json.loads(body)
        for part in (document["config"], *document["layers"]):
            assert digest_of(client.get(f"{root}/blobs/{part['digest']}").content) == part["digest"]


def largest_file(folder: Path) -> Path:
    """Returns the largest file below a folder: with the blobs of one image, its layer."""
    return max(folder.rglob("*"), key=lambda path: path.stat().st_size * path.is_file())


def lines(text: str) -> list[Any]:
    """Parses one JSON document per line."""
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.slow
def test_backups_while_clients_push(tmp_path: Path) -> None:
    """Three backups are made while threads push and delete images and the server collects garbage. Each backup can be
    restored. Each image whose push had ended before the backup began, and which was not deleted, can be pulled
    completely from the restored registry."""
    finished_pushes: list[tuple[str, bytes]] = []
    stop = threading.Event()

    def load(server: RegistryServer, thread: int) -> None:
        """Pushes images until `stop` is set, and deletes every third one again."""
        number = 0
        while not stop.is_set():
            number += 1
            try:
                pushed = push(server, f"load/app{thread}", f"v{number}")
            except AssertionError:  # on a busy machine, the blobs may be collected before their manifest is pushed
                continue
            if number % 3:
                finished_pushes.append(pushed)
            else:
                with plain_client(server.url) as client:
                    digest = digest_of(pushed[1])
                    assert client.delete(f"/v2/load/app{thread}/manifests/{digest}").status_code == 202

    with running_server(tmp_path, env=SHORT_GRACE_SETTINGS) as server:
        threads = [threading.Thread(target=load, args=(server, number)) for number in range(3)]
        for thread in threads:
            thread.start()
        try:
            while len(finished_pushes) < 20:
                assert all(thread.is_alive() for thread in threads)
                time.sleep(0.01)
            acknowledged = []
            for options in ((), ("--copy",), ("--verify",)):
                acknowledged.append(list(finished_pushes))
                output = entrepot_output("backup", "backups", "--json", *options, folder=tmp_path)
                assert json_lines(output)[-1]["missing"] == []
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    names = [
        snapshot["name"]
        for snapshot in lines(entrepot_output("restore", "backups", "--list", "--json", folder=tmp_path))
    ]
    assert len(names) == 3
    for name, expected in zip(names, acknowledged, strict=True):
        folder = tmp_path / name
        entrepot_output("restore", "backups", "--snapshot", name, "--data", folder / "data", folder=tmp_path)
        with running_server(folder) as restored:
            for path, body in expected:
                check_image(restored, path, body)


def test_output_of_the_commands(tmp_path: Path) -> None:
    """The commands report the number of tags, manifests and blobs, and wrong directories with one line. A restore warns
    if the time of a backup is in the future."""
    with running_server(tmp_path) as server:
        push(server, "team/app", "v1")
        first = entrepot_output("backup", "backups", folder=tmp_path).splitlines()
        second = entrepot_output("backup", "backups", "--keep", "1", folder=tmp_path).splitlines()
    assert ": 1 tag, 1 manifest, 2 blobs (" in first[0]
    assert first[1].startswith("2 blobs new (")
    assert second[1:] == ["0 blobs new (0 B copied), 2 already there", "1 old backup and 0 blobs removed"]
    listed = entrepot_output("restore", "backups", "--list", folder=tmp_path).splitlines()
    assert len([line for line in listed if "Z" in line]) == 1
    restored = entrepot_output("restore", "backups", "--data", "new", folder=tmp_path)
    assert ": 1 tag, 1 manifest, 2 blobs (" in restored
    assert "is not empty; name a new directory" in error_line(
        entrepot("restore", "backups", "--data", "new", folder=tmp_path), 1
    )
    assert "is in the data directory" in error_line(entrepot("backup", "data/backups", folder=tmp_path), 1)
    assert "name the directory of the backups" in error_line(entrepot("backup", folder=tmp_path), 2)
    assert "is no directory of backups" in error_line(entrepot("restore", "data", "--data", "x", folder=tmp_path), 1)
    [manifest_file] = (tmp_path / "backups").glob("snapshots/*/manifest.json")
    manifest_file.write_text(json.dumps(json.loads(manifest_file.read_text()) | {"time": "2999-01-01T00:00:00+00:00"}))
    completed = entrepot("restore", "backups", "--data", "newer", folder=tmp_path)
    assert completed.returncode == 0
    assert "entrepot: warning: the times of 1 of 1 backups are in the future" in completed.stderr


def test_restore_of_damaged_bytes(tmp_path: Path) -> None:
    """If a blob in the backup has wrong bytes, the restore fails and names its digest, and no command accepts the
    incomplete data directory. With --skip-damaged, the restore leaves out the blob."""
    with running_server(tmp_path) as server:
        push(server, "team/app", "v1")
        entrepot_output("backup", "backups", "--copy", folder=tmp_path)
    damaged_file = largest_file(tmp_path / "backups/blobs")
    flip_byte(damaged_file)
    completed = entrepot("restore", "backups", "--data", "new", folder=tmp_path)
    assert (completed.returncode, completed.stdout) == (1, "")
    assert f"sha256:{damaged_file.name} cannot be restored: its bytes have the digest sha256:" in completed.stderr
    assert "a restore from a backup has not ended" in error_line(
        entrepot("user", "add", "root", "--data", "new", "--password-file", "-", folder=tmp_path, stdin_text=PASSWORD),
        1,
    )
    for command in (["gc"], ["fsck"], ["user", "list"], ["export", "team/app:v1", "--to", "image.tar"]):
        refused = error_line(entrepot(*command, "--data", "new", folder=tmp_path), 1)
        assert "a restore from a backup has not ended" in refused, command
    findings = entrepot("doctor", "--offline", "--data", "new", folder=tmp_path)
    assert (findings.returncode, findings.stdout.count("restore from a backup has not ended")) == (1, 1)
    assert "entrepot serve --data" not in findings.stdout
    completed = entrepot("restore", "backups", "--data", "new", "--skip-damaged", folder=tmp_path)
    assert (completed.returncode, completed.stderr.splitlines()[-1]) == (1, "entrepot: 1 blob could not be restored")


@pytest.mark.slow
def test_backup_onto_a_full_disk(tmp_path: Path) -> None:
    """A backup onto a full disk fails with an error. After space is freed, the next backup keeps the blobs that are
    already there."""
    with running_server(tmp_path) as server:
        for number in range(4):
            push(server, "team/app", f"v{number}", 2_000_000)
    (tmp_path / "backups").mkdir()
    command = f"{sys.executable} -m registry backup backups --data data"
    script = (
        f"mount -t tmpfs -o size=6m none backups && ! {command} && find backups -name manifest.json && "
        f"mount -o remount,size=64m none backups && {command}"
    )
    completed = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", script],
        cwd=tmp_path,
        env=command_environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert completed.returncode == 0, completed.stderr
    assert "backups: the disk is full; free some space there and run the same command again" in completed.stderr
    first, second = completed.stdout.splitlines()
    assert ": 4 tags, 4 manifests, 8 blobs (" in first
    new, present = (int(text) for text in (second.split()[0], second.split(", ")[1].split()[0]))
    assert (new + present, present >= 1) == (8, True)


@pytest.mark.slow
def test_backup_after_a_killed_backup(tmp_path: Path) -> None:
    """After a backup is killed, the next backup keeps the blobs that are already there. The killed backup does not
    prevent garbage collection."""
    with running_server(tmp_path) as server:
        path, body = push(server, "team/app", "v1", 30_000_000)
        for number in range(5):
            push(server, "team/app", f"more{number}", 10_000_000)
        command = ("backup", "backups", "--copy", "--json")
        killed = entrepot(*command, folder=tmp_path, site=killing_site(tmp_path, 1, COMPLETE_FILE))
        assert killed.returncode == -signal.SIGKILL
        assert "no complete backup" in entrepot("restore", "backups", "--list", folder=tmp_path).stderr
        result = json_lines(entrepot_output(*command, folder=tmp_path))[-1]
        assert result["present_blobs"] >= 1
        assert result["present_blobs"] + result["copied_blobs"] == 12
        with plain_client(server.url) as client:
            assert client.delete(f"{path.rpartition('/')[0]}/{digest_of(body)}").status_code == 202
        layer = json.loads(body)["layers"][0]["digest"].partition(":")[2]
        file = server.data / f"blobs/sha256/{layer[:2]}/{layer}"
        assert file.exists()
        entrepot_output("gc", folder=tmp_path, ENTREPOT_GC__GRACE="0s")
        assert not file.exists()


@pytest.mark.slow
def test_restore_after_a_killed_restore(tmp_path: Path) -> None:
    """After a restore is killed, no server starts on its data directory. The next restore keeps the blobs that are
    already there, and the restored registry is complete."""
    with running_server(tmp_path) as server:
        pushed = [push(server, "team/app", f"v{number}", 10_000_000) for number in range(6)]
        entrepot_output("backup", "backups", folder=tmp_path)
    command = ("restore", "backups", "--data", "new/data", "--json")
    killed = entrepot(*command, folder=tmp_path, site=killing_site(tmp_path, 1, COMPLETE_FILE))
    assert killed.returncode == -signal.SIGKILL
    error = error_line(entrepot("serve", "--data", "new/data", "--listen", "127.0.0.1:0", folder=tmp_path), 1)
    assert "a restore from a backup has not ended" in error
    result = lines(entrepot_output(*command, folder=tmp_path))[-1]
    assert result["present_blobs"] >= 1
    assert result["present_blobs"] + result["restored_blobs"] == 12
    with running_server(tmp_path / "new") as restored:
        for path, body in pushed:
            check_image(restored, path, body)


@pytest.mark.parametrize("is_configured", [True, False])
def test_backups_by_the_api(tmp_path: Path, is_configured: bool) -> None:
    """An admin can start a backup into the directory of the settings, and sees it in the list. If the settings have no
    directory, the API responds with 409. If the directory cannot be read, the API says why."""
    entrepot_output("user", "add", ADMIN, "--admin", "--password-file", "-", folder=tmp_path, stdin_text=PASSWORD)
    env = {"ENTREPOT_BACKUP__TARGET": str(tmp_path / "backups"), "ENTREPOT_BACKUP__KEEP": "1"} if is_configured else {}
    with running_server(tmp_path, env=env) as server:
        site = AdminSite(server, tmp_path)
        if not is_configured:
            for answer in (site.call("POST", "/backups", {}), site.call("GET", "/backups")):
                assert (answer.status_code, code_of(answer)) == (409, "BACKUP_TARGET_UNKNOWN")
            return
        assert site.call_ok("GET", "/backups")["items"] == []
        for is_new in (False, True):
            job = site.call_ok("POST", "/backups", {"verify": True, "new": is_new})
            assert (job["arguments"]["verify"], job["arguments"]["new"]) == (True, is_new)
            while job["ended"] is None:
                time.sleep(0.05)
                job = site.call_ok("GET", f"/jobs/{job['id']}")
            assert (job["state"], job["started_by"], job["result"]["missing"]) == ("done", ADMIN, [])
        (backup,) = site.call_ok("GET", "/backups")["items"]
        assert (backup["name"], backup["tags"]) == (job["result"]["snapshot"], 0)
        shutil.rmtree(tmp_path / "backups/snapshots")
        (tmp_path / "backups/snapshots").write_text("no directory")
        answer = site.call("GET", "/backups")
        assert (answer.status_code, code_of(answer)) == (500, "BACKUP_FAILED")
        assert f"cannot read {tmp_path}/backups: Not a directory" in answer.text


def test_lost_and_damaged_blobs(tmp_path: Path) -> None:
    """If the file of a blob is missing, the backup fails. After `fsck --repair` has recorded the blob as damaged, the
    backup succeeds and reports the blob as left out."""
    with running_server(tmp_path) as server:
        push(server, "team/app", "v1")
        lost_file = largest_file(tmp_path / "data/blobs")
        lost_file.unlink()
        failed = entrepot("backup", "backups", folder=tmp_path)
        repaired = entrepot("fsck", "--repair", folder=tmp_path)
        after_repair = entrepot("backup", "backups", folder=tmp_path)
    assert (failed.returncode, repaired.returncode, after_repair.returncode) == (1, 0, 0)
    assert f"sha256:{lost_file.name} is not in the backup: its file is missing" in failed.stderr
    assert "1 problem, 1 repaired, 0 left; 1 blob or manifest known to be damaged" in repaired.stdout
    assert f"sha256:{lost_file.name} is not in the backup: the registry knows that it is damaged" in after_repair.stderr
    assert "left out 1 blob known to be damaged; push or pull the images again" in after_repair.stderr
