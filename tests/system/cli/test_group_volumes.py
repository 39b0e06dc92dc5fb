"""Tests with volumes that belong to root, and to a group that may write to them. Kubernetes prepares volumes like that
for a pod with `fsGroup`: the server runs as another user than the owner of the directory.

If the tests do not run as root, the volumes belong to the user who runs them.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from registry.cli.data_owner import server_user
from tests.fakes.client_images import image, write_layout
from tests.fakes.commands import command_environment, entrepot, entrepot_output
from tests.fakes.temporary_files import memory_root

IS_ROOT = os.geteuid() == 0
USER = 10001 if IS_ROOT else os.geteuid()
"""The uid of the server, and of the group of the volumes."""
AS_USER = (
    [
        *("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"),
        # Python may be installed in a folder that only root can read.
        *("--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search"),
        "--bounding-set=-all,+dac_read_search",
    ]
    if IS_ROOT
    else []
)


@pytest.fixture
def folder() -> Iterator[Path]:
    """Yields a folder that USER can enter but not change. pytest's temporary folders are closed to USER."""
    volumes = Path(tempfile.mkdtemp(prefix="entrepot-volumes-", dir=memory_root()))
    volumes.chmod(0o755)
    yield volumes
    shutil.rmtree(volumes)


def volume(path: Path, mode: int = 0o2775) -> Path:
    """Makes a folder like the root of a new ext4 volume after Kubernetes has applied `fsGroup`."""
    path.mkdir()
    os.chown(path, -1, USER if IS_ROOT else -1)
    path.chmod(mode)
    (path / "lost+found").mkdir(mode=0o700)
    return path


def run_as_user(*args: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs `entrepot` as USER."""
    return subprocess.run(
        [*AS_USER, sys.executable, "-m", "registry", *map(str, args)],
        cwd=folder,
        env=command_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
    )


def succeed_as_user(*args: str | Path, folder: Path) -> str:
    """Runs `entrepot` as USER, checks that it succeeds, and returns its stdout."""
    done = run_as_user(*args, folder=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def doctor_problems(output: str) -> list[Any]:
    """Returns the problems in the JSON of `entrepot doctor`."""
    return [finding for finding in json.loads(output)["findings"] if finding["level"] == "problem"]


@pytest.fixture
def data(folder: Path) -> Path:
    """A data directory on a volume, which a command of USER has filled."""
    path = volume(folder / "data")
    succeed_as_user("user", "add", "alice", "--admin", "--generate", "--data", path, folder=folder)
    return path


def test_a_backup_on_a_volume_restores(folder: Path, data: Path) -> None:
    """A backup and a restore need no right to change the mode of a volume's root. Other users can list this root, but
    cannot enter the directories of the backup, also if Kubernetes has given the group rights to them again."""
    backups = volume(folder / "backups")
    for _ in range(2):
        succeed_as_user("backup", backups, "--data", data, folder=folder)
        for name in ("blobs", "incoming", "snapshots"):
            assert stat.S_IMODE((backups / name).stat().st_mode) == 0o700
            (backups / name).chmod(0o2770)
    assert len(succeed_as_user("restore", backups, "--list", folder=folder).splitlines()) == 4
    new = volume(folder / "new")
    succeed_as_user("restore", backups, "--data", new, folder=folder)
    assert "alice" in succeed_as_user("user", "list", "--data", new, folder=folder)


def test_a_backup_in_a_directory_for_everyone(folder: Path, data: Path) -> None:
    """A backup can be made in a directory of another user to which everybody may write, like a share of a NAS. Only the
    user who made the backup can read its content."""
    succeed_as_user("backup", volume(folder / "backups", 0o777), "--data", data, folder=folder)
    for name in ("blobs", "incoming", "snapshots"):
        assert stat.S_IMODE((folder / "backups" / name).stat().st_mode) == 0o700


def test_a_backup_names_a_directory_that_cannot_be_written(folder: Path, data: Path) -> None:
    """If the user may not write to the directory of the backups, the error says so."""
    if IS_ROOT:
        volume(folder / "backups", 0o755)
        done = run_as_user("backup", folder / "backups", "--data", data, folder=folder)
        assert done.returncode == 1
        assert f"backups: Permission denied; this process runs as the user with uid {USER}" in done.stderr


def test_doctor_accepts_a_volume(folder: Path, data: Path) -> None:
    """`entrepot doctor` finds no problem with a volume whose files belong to the server's user, before and after the
    first start, whether this user or root runs the command."""
    for path in (data, volume(folder / "new")):
        for run in (run_as_user, entrepot):
            done = run("doctor", "--offline", "--json", "--data", path, folder=folder)
            assert doctor_problems(done.stdout) == []


def test_files_of_root_on_a_volume(folder: Path, data: Path) -> None:
    """If a file on a volume belongs to another user and the server's user cannot change it, `entrepot doctor` says how
    to give it to the server's user, and never to the owner of the volume. If the group may change it, nothing is wrong:
    Kubernetes gives the group of the pod all files."""
    if not IS_ROOT:
        return
    lock = data / "locks" / "metadata"
    for run in (run_as_user, entrepot):
        os.chown(lock, 0, USER)
        lock.chmod(0o640)
        (found,) = doctor_problems(run("doctor", "--offline", "--json", "--data", data, folder=folder).stdout)
        assert f"{lock} belongs to root" in found["what"]
        assert found["next"] == f"chown -R {USER} {data}"
        lock.chmod(0o660)
        assert doctor_problems(run("doctor", "--offline", "--json", "--data", data, folder=folder).stdout) == []
    lock.chmod(0o640)
    subprocess.run(found["next"], shell=True, check=True)
    succeed_as_user("gc", "--data", data, folder=folder)


def test_root_runs_commands_as_the_server(folder: Path, data: Path) -> None:
    """If root runs a command on a volume, the command becomes the user who owns the database. So the server can change
    the files that the command makes."""
    write_layout(folder / "layout", {"v1": image("one")})
    entrepot_output("import", folder / "layout", "--as", "team/app", "--data", data, folder=folder)
    entrepot_output("gc", "--data", data, folder=folder)
    paths = [path for path in data.rglob("*") if path.name != "lost+found"]
    assert any(path.is_file() for path in (data / "blobs").rglob("*"))
    assert {path.stat().st_uid for path in paths} == {USER}


def test_root_that_may_not_become_the_server(folder: Path, data: Path) -> None:
    """A command of root works on a volume also in a container whose root may not become another user."""
    if IS_ROOT:
        command = [sys.executable, "-m", "registry", "gc", "--data", str(data)]
        as_weak_root = ["setpriv", "--inh-caps=-setuid", "--bounding-set=-setuid"]
        done = subprocess.run(
            [*as_weak_root, *command], cwd=folder, env=command_environment(), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


def test_the_user_of_a_linked_database(folder: Path) -> None:
    """If the database is a symbolic link, root's command becomes the user who made the link. So a user who may write to
    the directory cannot choose another one."""
    if IS_ROOT:
        volume(folder / "data", 0o777)
        (folder / "file").touch()
        os.chown(folder / "file", USER + 1, USER + 1)
        (folder / "data/entrepot.db").symlink_to(folder / "file")
        os.chown(folder / "data/entrepot.db", USER, USER, follow_symlinks=False)
        assert server_user(folder / "data") == (USER, USER)


def test_a_file_in_place_of_the_directory(folder: Path) -> None:
    """If the data directory is a file, `entrepot doctor` and other commands say so."""
    (folder / "data").touch()
    found = doctor_problems(entrepot("doctor", "--offline", "--json", "--data", folder / "data", folder=folder).stdout)
    assert f"{folder}/data is not a directory" in [problem["what"] for problem in found]
    added = entrepot("user", "add", "alice", "--generate", "--data", folder / "data", folder=folder)
    assert f"{folder}/data is not a directory" in added.stderr


def test_doctor_keeps_a_directory_for_everyone_usable(folder: Path) -> None:
    """If the server can write to the data directory only because everyone can, the next step of `entrepot doctor` first
    gives the directory to the server's user."""
    data = volume(folder / "data", 0o777)
    os.chown(data, -1, 0 if IS_ROOT else -1)
    succeed_as_user("user", "add", "alice", "--admin", "--generate", "--data", data, folder=folder)
    for run in (run_as_user, entrepot):
        (found,) = doctor_problems(run("doctor", "--offline", "--json", "--data", data, folder=folder).stdout)
        assert "everybody may write" in found["what"]
        assert found["next"] == (f"chown {USER} {data} && " if IS_ROOT else "") + f"chmod o-w {data}"
    subprocess.run(found["next"], shell=True, check=True)
    succeed_as_user("gc", "--data", data, folder=folder)


def test_a_subdirectory_of_another_user(folder: Path, data: Path) -> None:
    """A server starts although a directory on its volume belongs to another user and everybody may read it, if its
    group may write to it."""
    os.chown(data / "blobs", 0 if IS_ROOT else -1, -1)
    (data / "blobs").chmod(0o2775)
    prepare = "from pathlib import Path; from storage.composition import prepare_data_dir as p; p(Path('data'))"
    done = subprocess.run(
        [*AS_USER, sys.executable, "-c", prepare], cwd=folder, env=command_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
