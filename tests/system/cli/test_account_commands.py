"""Tests of the commands `entrepot user`, `robot`, `token`, `group`, `grant`, `key` and `audit` on a data directory
without a server. A robot is an account for a program."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.commands import entrepot, entrepot_output, error_line
from tests.fakes.server_process import ROOT

PASSWORD = "correct horse battery"
GENERATED_PASSWORD = re.compile(r"[a-z1-9]{5}(-[a-z1-9]{5}){3}\n")
API_TOKEN = re.compile(r"ent_[0-9A-Za-z]{12}_[0-9A-Za-z]{43}\n")


def listed(*args: str, folder: Path) -> Any:
    """Returns the JSON output of a command."""
    return json.loads(entrepot_output(*args, "--json", folder=folder))


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder whose data directory has one account, the admin alice. Tests must not change it."""
    account_folder = tmp_path_factory.mktemp("accounts")
    entrepot_output(
        "user", "add", "alice", "--admin", "--password-file", "-", folder=account_folder, stdin_text=PASSWORD
    )
    return account_folder


@pytest.fixture
def folder(tmp_path: Path, unchanged: Path) -> Path:
    """Returns a folder with a copy of the data directory of `unchanged`, which tests may change."""
    shutil.copytree(unchanged / "data", tmp_path / "data")
    return tmp_path


def test_the_first_account(tmp_path: Path) -> None:
    """The command that adds the first account creates the data directory. It says that the registry is closed from now
    on (clients need an account), and what to do next. Later commands do not say this again. stdout has only the
    generated password."""
    completed = entrepot("user", "add", "alice", "--admin", "--generate", folder=tmp_path)
    assert (completed.returncode, bool(GENERATED_PASSWORD.fullmatch(completed.stdout))) == (0, True)
    assert f"The registry at {tmp_path / 'data'} is closed from now on" in completed.stderr
    assert "docker login 127.0.0.1:5000 --username alice" in completed.stderr
    assert "there is none yet" not in completed.stderr
    second = entrepot("robot", "add", "ci", folder=tmp_path)
    assert second.stderr == "ci is added; to make an API token for its login, run: entrepot token add ci\n"


def test_if_first_adds_only_the_first_account(tmp_path: Path) -> None:
    """With --if-first, the command can run at each start of a container. It adds the account to a new registry. If the
    registry has or had an account, the command changes nothing and needs no password."""
    (tmp_path / "password.txt").write_text(PASSWORD)
    command = ("user", "add", "admin", "--admin", "--if-first", "--password-file", "password.txt")
    assert "admin is added, an admin" in entrepot(*command, folder=tmp_path).stderr
    entrepot_output("user", "add", "alice", "--admin", "--generate", folder=tmp_path)
    entrepot_output("user", "remove", "admin", folder=tmp_path)
    (tmp_path / "password.txt").unlink()
    second_run = entrepot(*command, folder=tmp_path)
    assert (second_run.returncode, second_run.stderr) == (0, "admin is not added: the registry has or had an account\n")
    assert [user["name"] for user in listed("user", "list", folder=tmp_path)] == ["alice"]


def test_first_account_is_a_robot(tmp_path: Path) -> None:
    """If the first account is a robot, the registry is closed as well. The command says that there is no admin yet."""
    message = entrepot("robot", "add", "ci", folder=tmp_path).stderr
    assert "is closed from now on" in message
    assert "entrepot user add NAME --admin   (there is none yet)" in message


def test_users(folder: Path) -> None:
    """The commands add, list, show, disable and remove people, and make them admins."""
    entrepot_output("user", "add", "bob", "--note", "on call", "--generate", folder=folder)
    alice, bob = listed("user", "list", folder=folder)
    assert (alice["name"], alice["admin"], alice["enabled"]) == ("alice", True, True)
    assert (bob["name"], bob["admin"], bob["note"], bob["groups"]) == ("bob", False, "on call", [])
    output = entrepot_output("user", "list", folder=folder)
    assert re.search(r"^alice +enabled +admin ", output, re.MULTILINE)
    assert re.search(r"^bob +enabled +- .* on call *$", output, re.MULTILINE)
    entrepot_output("user", "disable", "bob", folder=folder)
    entrepot_output("user", "admin", "bob", folder=folder)
    assert "bob, disabled, an admin" in entrepot_output("user", "show", "bob", folder=folder)
    entrepot_output("user", "enable", "bob", folder=folder)
    entrepot_output("user", "admin", "bob", "--off", folder=folder)
    assert GENERATED_PASSWORD.fullmatch(entrepot_output("user", "password", "bob", "--generate", folder=folder))
    entrepot_output("user", "remove", "bob", folder=folder)
    assert [user["name"] for user in listed("user", "list", folder=folder)] == ["alice"]
    assert "there is no account bob" in error_line(entrepot("user", "show", "bob", folder=folder), 1)


def test_passwords_come_from_a_file(folder: Path) -> None:
    """The password is the first line of the file, without the end of the line. Without a terminal, the command does not
    ask for a password and fails."""
    (folder / "password.txt").write_bytes(b"sesame open\r\nanother line\n")
    entrepot_output("user", "add", "bob", "--password-file", "password.txt", folder=folder)
    for stdin_text, message in (("", "no password on stdin"), ("short\n", "a password has 8 to")):
        args = ("user", "add", "carol", "--password-file", "-")
        assert message in error_line(entrepot(*args, folder=folder, stdin_text=stdin_text), 1)
    assert "no terminal" in error_line(entrepot("user", "add", "carol", folder=folder), 2)
    assert "No such file" in error_line(
        entrepot("user", "add", "carol", "--password-file", "none.txt", folder=folder), 1
    )
    contradicting_args = ("user", "add", "carol", "--generate", "--password-file", "-")
    assert "contradict" in error_line(entrepot(*contradicting_args, folder=folder), 2)


def test_password_prompt_at_a_terminal(folder: Path) -> None:
    """At a terminal, the command asks for the password twice, and the terminal does not show the typed letters."""
    master, terminal = os.openpty()
    command = [sys.executable, "-m", "registry", "user", "add", "bob"]
    with subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=terminal,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        os.close(terminal)
        assert process.stderr is not None
        message = b""
        for prompt in (b"Password for bob: ", b"The same again: "):
            while prompt not in message:
                letter = process.stderr.read(1)
                assert letter, message
                message += letter
            os.write(master, PASSWORD.encode() + b"\n")
        message += process.stderr.read()
        assert process.wait(60) == 0, message
    os.set_blocking(master, False)
    try:
        echoed = os.read(master, 4096)
    except (BlockingIOError, OSError):
        echoed = b""
    os.close(master)
    assert PASSWORD.encode() not in message + echoed
    assert [user["name"] for user in listed("user", "list", folder=folder)] == ["alice", "bob"]


@pytest.mark.parametrize("name", ["Alice", "a:b", "everyone", "-x", "a" * 65, ""])
def test_invalid_names(unchanged: Path, name: str) -> None:
    """With an invalid name, the command fails with one line that describes valid names."""
    assert "is no name for an account" in error_line(entrepot("robot", "add", "--", name, folder=unchanged), 1)


def test_name_that_is_in_use(unchanged: Path) -> None:
    """A name that an account has cannot be used for another user, robot or group."""
    for args in (("user", "add", "alice", "--generate"), ("robot", "add", "alice"), ("group", "add", "alice")):
        assert "alice" in error_line(entrepot(*args, folder=unchanged), 1)


def test_the_last_admin(folder: Path) -> None:
    """Without --force, the last enabled admin cannot be disabled, removed or made an ordinary account. If there is a
    second admin, the first admin can be disabled."""
    changes = (("user", "disable", "alice"), ("user", "admin", "alice", "--off"), ("user", "remove", "alice"))
    for change in changes:
        assert "alice is the last admin who is enabled" in error_line(entrepot(*change, folder=folder), 1)
    entrepot_output("user", "add", "bob", "--admin", "--generate", folder=folder)
    entrepot_output("user", "disable", "alice", folder=folder)
    assert "bob is the last admin" in error_line(entrepot("user", "remove", "bob", folder=folder), 1)
    entrepot_output("user", "remove", "bob", "--force", folder=folder)
    assert [user["name"] for user in listed("user", "list", folder=folder)] == ["alice"]


def test_robots_and_tokens(folder: Path) -> None:
    """API tokens of a robot can be added, limited, listed and revoked. The command that adds a token prints its secret.
    Later commands never show it."""
    entrepot_output("robot", "add", "ci", "--note", "builds", folder=folder)
    (robot,) = listed("robot", "list", folder=folder)
    assert (robot["name"], robot["kind"], robot["note"]) == ("ci", "robot", "builds")
    limits = ("--allow", "team/**:pull,push", "--allow", "base/*:pull")
    completed = entrepot("token", "add", "ci", "--expires", "90d", "--note", "main", *limits, folder=folder)
    assert API_TOKEN.fullmatch(completed.stdout)
    assert "docker login 127.0.0.1:5000 --username ci --password-stdin" in completed.stderr
    assert completed.stdout.strip() not in completed.stderr
    (token,) = listed("token", "list", "ci", folder=folder)
    assert (token["account"], token["note"], token["purpose"], token["used"]) == ("ci", "main", "personal", None)
    assert token["limits"] == [
        {"pattern": "team/**", "actions": ["pull", "push"]},
        {"pattern": "base/*", "actions": ["pull"]},
    ]
    assert token["id"] == completed.stdout.split("_")[1]
    assert token["expires"] > token["created"]
    output = entrepot_output("token", "list", folder=folder)
    assert "team/**:pull,push base/*:pull" in output
    assert completed.stdout.strip().split("_")[2] not in output
    entrepot_output("token", "revoke", token["id"], folder=folder)
    assert listed("token", "list", folder=folder) == []
    assert "no such API token" in error_line(entrepot("token", "revoke", token["id"], folder=folder), 1)
    entrepot_output("robot", "disable", "ci", folder=folder)
    assert not listed("robot", "list", folder=folder)[0]["enabled"]
    entrepot_output("robot", "enable", "ci", folder=folder)
    entrepot_output("robot", "remove", "ci", folder=folder)
    assert listed("robot", "list", folder=folder) == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("token", "add", "nobody"), "there is no account nobody"),
        (("token", "add", "alice", "--expires", "soon"), "is not a duration"),
        (("token", "add", "alice", "--expires", "0"), "expired already"),
        (("token", "add", "alice", "--allow", "team/**"), "does not say what is allowed"),
        (("token", "add", "alice", "--allow", "team/**:fly"), "'fly' is not an action"),
        (("token", "list", "nobody"), "there is no account nobody"),
        (("user", "show", "none"), "there is no account none"),
        (("robot", "disable", "alice"), "alice is a user, not a robot"),
        (("group", "join", "none", "alice"), "there is no group none"),
        (("group", "remove", "alice"), "there is no group alice"),
        (("grant", "add", "team/", "pull", "everyone"), "for all names below it write team/**"),
        (("grant", "add", "team/**", "fly", "everyone"), "'fly' is not an action"),
        (("grant", "add", "team/**", "pull", "alice"), "write user:NAME"),
        (("grant", "add", "team/**", "pull", "group:none"), "there is no group none"),
        (("grant", "remove", "team/**", "everyone"), "was granted nothing for team/**"),
        (("audit", "--since", "yesterday"), "is not a duration"),
    ],
)
def test_errors_are_one_line(unchanged: Path, args: tuple[str, ...], message: str) -> None:
    """With an unknown or invalid argument, the command fails with one line and exit code 1."""
    assert message in error_line(entrepot(*args, folder=unchanged), 1)


def test_groups(folder: Path) -> None:
    """Accounts can join and leave groups. A command that names several accounts changes all of them or none. If a new
    member has no account, the command accepts it and notes this, because the name may be mistyped."""
    entrepot_output("robot", "add", "ci", folder=folder)
    entrepot_output("group", "add", "dev", folder=folder)
    completed = entrepot("group", "join", "dev", "alice", "ci", "zoe", folder=folder)
    assert "note: the data directory has no account zoe" in completed.stderr
    assert "alice here" not in completed.stderr
    assert listed("group", "list", folder=folder) == [{"name": "dev", "members": ["alice", "ci", "zoe"]}]
    entrepot_output("group", "leave", "dev", "zoe", "ci", folder=folder)
    assert re.search(r"^dev +alice *$", entrepot_output("group", "list", folder=folder), re.MULTILINE)
    assert listed("user", "list", folder=folder)[0]["groups"] == ["dev"]
    assert "ci is not in the group dev" in error_line(
        entrepot("group", "leave", "dev", "alice", "ci", folder=folder), 1
    )
    assert listed("group", "list", folder=folder) == [{"name": "dev", "members": ["alice"]}]
    entrepot_output("group", "remove", "dev", folder=folder)
    assert listed("group", "list", folder=folder) == []


def test_grants(folder: Path) -> None:
    """Grants are added, replaced, removed, and listed by subject or by the account to which they apply."""
    entrepot_output("group", "add", "dev", folder=folder)
    entrepot_output("group", "join", "dev", "alice", folder=folder)
    entrepot_output("grant", "add", "team/**", "pull", "group:dev", "user:bob", folder=folder)
    entrepot_output("grant", "add", "team/**", "pull,push", "group:dev", folder=folder)
    entrepot_output("grant", "add", "**", "pull", "everyone", folder=folder)
    dev = {"subject": "group:dev", "pattern": "team/**", "actions": ["pull", "push"]}
    everyone = {"subject": "everyone", "pattern": "**", "actions": ["pull"]}
    assert listed("grant", "list", "--subject", "group:dev", folder=folder) == [dev]
    assert listed("grant", "list", "--for", "alice", folder=folder) == [dev, everyone]
    assert len(listed("grant", "list", folder=folder)) == 3
    assert re.search(
        r"^team/\*\* +pull,push +group:dev *$", entrepot_output("grant", "list", folder=folder), re.MULTILINE
    )
    entrepot_output("grant", "remove", "team/**", "group:dev", "user:bob", folder=folder)
    assert listed("grant", "list", folder=folder) == [everyone]
    contradicting_args = ("grant", "list", "--for", "alice", "--subject", "everyone")
    assert "contradict" in error_line(entrepot(*contradicting_args, folder=folder), 2)


def test_keys(folder: Path) -> None:
    """After a rotation, `key list` shows the new signing key and the retired one. It does not show the secrets of the
    keys."""
    for _ in range(2):
        entrepot_output("key", "rotate", folder=folder)
    signing, retired = listed("key", "list", folder=folder)
    assert set(signing) == {"id", "created", "retired"}
    assert signing["retired"] is None
    assert retired["retired"] is not None
    assert re.search(rf"^{signing['id']} .* signs *$", entrepot_output("key", "list", folder=folder), re.MULTILINE)


def test_audit(folder: Path) -> None:
    """`audit` lists the log, newest entry first, and can filter it by actor, action, target, outcome and time. The
    actor is the user who ran the command. Under sudo, it is the user who called sudo."""
    entrepot_output("group", "add", "dev", folder=folder)
    entrepot_output("grant", "add", "team/**", "pull", "group:dev", folder=folder, SUDO_USER="erin")
    lines = listed("audit", folder=folder)
    assert [line["action"] for line in lines] == ["grant.put", "group.add", "account.add"]
    actor = lines[1]["actor"]
    assert actor.startswith("cli:")
    if os.geteuid() == 0:
        assert lines[0]["actor"] == "cli:erin"
    assert [line["target"] for line in listed("audit", "--actor", actor, "--limit", "1", folder=folder)] == ["dev"]
    assert len(listed("audit", "--action", "group.add", "--since", "1h", folder=folder)) == 1
    assert len(listed("audit", "--action", "group.add", "--until", "0s", folder=folder)) == 1
    assert listed("audit", "--until", "1h", folder=folder) == []
    assert len(listed("audit", "--target", "alice", "--outcome", "ok", folder=folder)) == 1
    assert listed("audit", "--outcome", "denied", folder=folder) == []
    assert re.search(r" ok +cli:\S+ +group\.add +dev ", entrepot_output("audit", folder=folder))


def test_grant_explain(folder: Path) -> None:
    """`grant explain` shows what an account, or a client without a login, may do on each repository that a name can
    mean, and which grants allow it."""
    entrepot_output("user", "add", "bob", "--password-file", "-", folder=folder, stdin_text=PASSWORD)
    entrepot_output("grant", "add", "team/**", "pull,push", "user:bob", folder=folder)
    entrepot_output("grant", "add", "docker.io/**", "pull", "everyone", folder=folder)
    mirror = {"ENTREPOT_MIRROR": "docker.io"}
    result = entrepot("grant", "explain", "team/app", "--for", "bob", folder=folder, **mirror)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("bob may pull, push on team/app\n")
    assert "bob may pull on docker.io/team/app, which is mirrored from docker.io\n" in result.stdout
    assert re.search(r"^team/\*\* +pull,push +user:bob", result.stdout, re.MULTILINE)
    nobody = entrepot("grant", "explain", "team/app", folder=folder)
    assert nobody.stdout == "a client without a login may do nothing on team/app\n"
    assert "alice is an admin" in entrepot("grant", "explain", "x/y", "--for", "alice", folder=folder).stderr
    assert "no account eve" in entrepot("grant", "explain", "x/y", "--for", "eve", folder=folder).stderr
    explained = listed("grant", "explain", "team/app", "--for", "bob", folder=folder)
    assert [each["actions"] for each in explained["repositories"]] == [["pull", "push"]]
    entrepot_output("user", "disable", "bob", folder=folder)
    disabled = entrepot("grant", "explain", "team/app", "--for", "bob", folder=folder)
    assert (disabled.stdout.splitlines()[0], "disabled" in disabled.stderr) == ("bob may do nothing on team/app", True)
    assert entrepot("grant", "explain", "Not/A/Name", folder=folder).returncode == 1


def test_list_creates_no_data_directory(tmp_path: Path) -> None:
    """Without a data directory, a list command fails and creates none."""
    for kind in ("user", "grant"):
        assert "no data directory" in error_line(entrepot(kind, "list", folder=tmp_path), 1)
    assert list(tmp_path.iterdir()) == []


def test_empty_lists(folder: Path) -> None:
    """If a list is empty, stderr says how to add an entry. The JSON output is an empty array."""
    completed = entrepot("robot", "list", folder=folder)
    assert (completed.returncode, completed.stdout) == (0, "")
    assert "entrepot robot add" in completed.stderr
    assert listed("robot", "list", folder=folder) == []


def test_secrets_are_in_no_file_and_no_output(folder: Path) -> None:
    """Passwords and the secrets of tokens are not in the files of the data directory, nor in the output of any command
    that shows accounts, tokens, keys, settings or the audit log."""
    secrets = [PASSWORD, entrepot_output("user", "add", "bob", "--generate", folder=folder).strip()]
    secrets.append(entrepot_output("user", "password", "bob", "--generate", folder=folder).strip())
    token = entrepot_output("token", "add", "alice", folder=folder).strip()
    secrets += [token, token.split("_")[2]]
    entrepot_output("key", "rotate", folder=folder)
    output = entrepot_output("config", "--format", "json", folder=folder)
    for args in (("user", "list"), ("user", "show", "bob"), ("token", "list"), ("key", "list"), ("audit",)):
        output += entrepot_output(*args, folder=folder) + entrepot_output(*args, "--json", folder=folder)
    files = [file for file in (folder / "data").rglob("*") if file.is_file()]
    assert files
    for secret in secrets:
        assert secret not in output
        assert [file for file in files if secret.encode() in file.read_bytes()] == []
