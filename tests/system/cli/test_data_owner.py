"""Tests that all files in a data directory belong to its owner, even if root runs the commands.

If the tests run as root, the directory belongs to uid 65534. Otherwise, it belongs to the user who runs the tests.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx2
import pytest

from registry.cli.data_owner import become_owner, operator_actor
from registry.server.process.control_socket import listen_for_control
from storage.data_dir.layout import Layout
from storage.names import Digest
from tests.fakes.client_images import image, write_layout
from tests.fakes.commands import entrepot, entrepot_output, entrepot_program
from tests.fakes.plain_client import plain_request
from tests.fakes.server_process import running_server
from tests.fakes.temporary_files import memory_root

PUBLIC_IMPORTS = """
import importlib.readers, os, sys
from pathlib import Path

def is_public(folder):
    return all(path.exists() and path.stat().st_mode & 0o005 == 0o005 for path in (folder, *folder.parents))

sys.path[:] = [entry for entry in sys.path if is_public(Path(entry).absolute())]
"""
"""Code after which a process imports modules only from folders that every user can read. Then it keeps no right of root
when it becomes the owner of the data directory, wherever Python is installed."""


ERIN = {"SUDO_USER": "erin"} if os.geteuid() == 0 else {}
"""Environment variable of a command that erin runs with sudo."""
OPERATOR = "cli:erin" if ERIN else operator_actor().name
"""The actor of such a command. Without root's rights, the user who runs the tests."""
OWNER = 65534 if os.geteuid() == 0 else os.geteuid()
"""The uid of the owner of the data directory. Debian's user nobody has the uid 65534."""


@pytest.fixture
def folder() -> Iterator[Path]:
    """Yields a folder with a data directory of OWNER. It is not one of pytest's temporary folders, because OWNER could
    not enter them."""
    owner_folder = Path(tempfile.mkdtemp(prefix="entrepot-owner-", dir=memory_root()))
    owner_folder.chmod(0o755)
    (owner_folder / "data").mkdir(mode=0o700)
    os.chown(owner_folder / "data", OWNER, -1)
    yield owner_folder
    shutil.rmtree(owner_folder)


@pytest.fixture
def public_imports(tmp_path: Path) -> str:
    """Returns the path of a file with PUBLIC_IMPORTS, for the parameter `site` of `entrepot`."""
    (tmp_path / "public_imports.py").write_text(PUBLIC_IMPORTS)
    return str(tmp_path / "public_imports.py")


def owners(data: Path) -> set[int]:
    """Returns the uids of the owners of the directory and of everything in it."""
    return {entry.stat().st_uid for entry in (data, *data.rglob("*"))}


def push(url: str) -> None:
    """Pushes an image of one blob, with a tag."""
    body = b"{}"
    digest = "sha256:" + hashlib.sha256(body).hexdigest()
    started = plain_request("POST", f"{url}/v2/team/app/blobs/uploads/")
    location = httpx2.URL(url).join(started.headers["location"]).copy_merge_params({"digest": digest})
    assert plain_request("PUT", location, content=body).status_code == 201
    kind = "application/vnd.oci.image.manifest.v1+json"
    config = {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest, "size": len(body)}
    manifest = json.dumps({"schemaVersion": 2, "mediaType": kind, "config": config, "layers": []})
    put = plain_request("PUT", f"{url}/v2/team/app/manifests/1", content=manifest, headers={"content-type": kind})
    assert put.status_code == 201


@pytest.mark.parametrize("workers", [1, 2])
def test_files_of_serve_and_inspect_belong_to_the_owner(folder: Path, workers: int) -> None:
    """After a server has run on the directory, a client has pushed, and `entrepot inspect` has run, all files belong to
    the owner. The workers of the server run with the uid of the owner."""
    with running_server(folder, workers=workers, own_interpreter=True) as server:
        push(server.url)
        assert {os.stat(f"/proc/{pid}").st_uid for pid in server.worker_pids()} == {OWNER}
        result = entrepot_program("inspect", "team/app:1", "--json", "--data", folder / "data", folder=folder)
        assert json.loads(result.stdout)["tags"] == ["1"]
    assert entrepot_program("inspect", "team/app:1", "--data", folder / "data", folder=folder).returncode == 0
    assert owners(folder / "data") == {OWNER}


def test_files_of_account_commands_belong_to_the_owner(folder: Path) -> None:
    """After a command has created the database and another command has changed it, all files belong to the owner."""
    for args in (("user", "add", "alice", "--generate"), ("grant", "add", "**", "pull", "everyone")):
        assert entrepot_program(*args, "--data", folder / "data", folder=folder).returncode == 0
    assert owners(folder / "data") == {OWNER}


def test_a_forbidden_blob_file_does_not_end_the_upkeep(folder: Path, public_imports: str) -> None:
    """If a blob's file cannot be read, scrub and fsck name the file and the command that helps, and check everything
    else. After that command, they find nothing. The file belongs to root, who has copied it into its place. Without
    root's rights, it is a file that even its owner may not read."""
    with running_server(folder) as server:
        push(server.url)
    file = Layout(folder / "data").blob(Digest("sha256:" + hashlib.sha256(b"{}").hexdigest()))
    if os.geteuid() == 0:
        os.chown(file, 0, 0)
        file.chmod(0o600)
        remedy = f"chown {OWNER}:"
    else:
        file.chmod(0)
        remedy = f"chmod u+rX {file}"
    commands = [("scrub",), ("fsck",), ("fsck", "--hash")]
    for command in commands:
        done = entrepot(*command, "--data", folder / "data", folder=folder, site=public_imports)
        assert done.returncode == 1, done.stderr
        [line] = [line for line in done.stdout.splitlines() if str(file) in line]
        assert f"cannot read {file}: Permission denied; run as root: {remedy}" in line
        assert command != ("scrub",) or "read 1 blob and 1 manifest (2 B); found damaged: 0" in done.stderr
    subprocess.run(line.rpartition("run as root: ")[2].split(), check=True)
    for command in commands:
        assert entrepot(*command, "--data", folder / "data", folder=folder, site=public_imports).returncode == 0


def test_root_reaches_a_server_that_its_owner_could_not(folder: Path, public_imports: str) -> None:
    """`entrepot reload` by root reaches the control socket also if the owner of the data directory may not enter a
    directory above it. systemd puts the data there with `DynamicUser=yes`."""
    (folder / "private").mkdir(mode=0o700)
    data = (folder / "data").rename(folder / "private" / "data")
    listener = listen_for_control(data / "control")
    assert listener is not None
    os.chown(data / "control", OWNER, -1)

    def answer() -> None:
        connection, _ = listener.accept()
        with connection, suppress(BrokenPipeError):
            connection.recv(4096)
            connection.sendall(b'{"ok": true, "message": "reloaded"}\n')

    with listener:
        listener.settimeout(60)
        thread = threading.Thread(target=answer)
        thread.start()
        done = entrepot("reload", "--data", data, folder=folder, site=public_imports)
        if done.returncode != 0:  # ends the thread
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(data / "control"))
        thread.join()
    assert (done.returncode, done.stdout) == (0, "reloaded\n"), done.stderr


def test_password_file_that_only_root_can_read(folder: Path, public_imports: str) -> None:
    """`user add --if-first` reads the password as root, before it becomes the owner to look for accounts. If there is
    an account, it needs no password."""
    file = folder / "password.txt"
    file.write_text("correct horse battery")
    file.chmod(0o600)
    command = ("user", "add", "admin", "--if-first", "--password-file", file, "--data", folder / "data")
    assert "admin is added" in entrepot(*command, folder=folder, site=public_imports).stderr
    file.unlink()
    second_run = entrepot(*command, folder=folder, site=public_imports)
    assert (second_run.returncode, "admin is not added" in second_run.stderr) == (0, True)


def test_commands_name_the_user_who_called_sudo(folder: Path) -> None:
    """Erin runs commands with sudo, and each command becomes the owner of the data directory. Erin is the actor in the
    audit log, in the history of a tag, and of a job."""
    write_layout(folder / "layout", {"v1": image("one")})

    def run(*args: str | Path) -> str:
        return entrepot_output(*args, "--data", folder / "data", folder=folder, **ERIN)

    run("user", "add", "alice", "--generate", "--if-first")
    run("import", folder / "layout", "--as", "team/app")
    run("tag", "move", "team/app:v2", "v1")
    run("tag", "delete", "team/app:v1")
    run("gc")
    tags = json.loads(run("tag", "history", "team/app", "--json"))
    assert {(change["tag"], change["actor"]) for change in tags} == {("v1", OPERATOR), ("v2", OPERATOR)}
    audit = json.loads(run("audit", "--json"))
    assert {entry["actor"] for entry in audit if entry["action"] in ("account.add", "tag.delete")} == {OPERATOR}
    assert {job["started_by"] for job in json.loads(run("jobs", "list", "--json"))} == {OPERATOR}
    assert owners(folder / "data") == {OWNER}


def test_second_start_on_the_same_directory(folder: Path) -> None:
    """A second start of the server on the same directory works, and all files still belong to the owner."""
    for _ in range(2):
        with running_server(folder, workers=1, own_interpreter=True) as server:
            push(server.url)
    assert owners(folder / "data") == {OWNER}


def test_process_of_the_owner_keeps_its_user(tmp_path: Path) -> None:
    """If the directory belongs to the process's own user, or does not exist, the process keeps its user and groups."""
    ids_before = (os.geteuid(), os.getegid(), os.getgroups())
    become_owner(tmp_path)
    become_owner(tmp_path / "missing")
    assert (os.geteuid(), os.getegid(), os.getgroups()) == ids_before
