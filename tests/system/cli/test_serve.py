"""Tests of `entrepot serve`: the banner (the lines that it prints at the start), and the errors if it cannot start."""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import nullcontext
from pathlib import Path

import pytest

from registry import __version__
from registry.cli.server_preparation import OpenToEveryoneError, check_open_to_everyone
from registry.config import Settings
from storage.access import AccountKind, AccountName
from storage.composition import open_accounts, prepare_data_dir
from storage.content import Actor
from tests.fakes.commands import entrepot, error_line
from tests.fakes.plain_client import plain_request
from tests.fakes.second_connection import second_connection
from tests.fakes.server_process import RegistryServer, running_server


def test_banner(server: RegistryServer) -> None:
    """The banner has the version, the address with the real port, the absolute path of the data directory, an example
    of a push, and how to stop the server. The server responds at this address."""
    assert plain_request("GET", server.url + "/v2/").status_code == 200
    assert server.stop() == 0
    lines = server.log_text().splitlines()
    first = lines.index(f"Entrepot {__version__} listens on http://127.0.0.1:{server.port}")
    rows = [line.split(maxsplit=1) for line in lines[first + 1 : first + 6]]
    assert rows[0] == ["data", str(server.data.resolve())]
    assert rows[1][0] == "try"
    assert rows[1][1].endswith(f"docker push 127.0.0.1:{server.port}/team/busybox")
    assert rows[2] == ["note", "there are no accounts: whoever reaches this address can push and delete"]
    assert rows[3] == ["accounts", f"entrepot user add NAME --admin --data {server.data.resolve()}"]
    assert rows[4][0] == "stop"


def test_start_of_a_read_only_registry(tmp_path: Path) -> None:
    """The banner of a read-only registry has an example of a pull instead of a push, and the server refuses an
    upload."""
    with running_server(tmp_path, "--read-only", workers=1, own_interpreter=True) as server:
        assert plain_request("POST", server.url + "/v2/a/blobs/uploads/").status_code == 405
    assert f"docker pull {server.address}/team/busybox" in server.log_text()
    assert "docker push" not in server.log_text()


@pytest.mark.parametrize("listen", ["0.0.0.0:0", ":0", "[::]:0"])
def test_start_on_every_address_without_accounts(tmp_path: Path, listen: str) -> None:
    """Without accounts, the server does not start on all addresses. The error is one line that says what to do."""
    line = error_line(entrepot("serve", "--listen", listen, folder=tmp_path), 1)
    assert "there are no accounts" in line
    assert "`entrepot user add NAME --admin`" in line
    assert "--insecure-open" in line


def test_start_on_every_address_insecurely(tmp_path: Path) -> None:
    """With --insecure-open or its environment variable, the server starts on all addresses without accounts, and the
    banner warns of this."""
    with running_server(tmp_path, "--insecure-open", workers=1, listen="0.0.0.0:0") as server:
        pass
    assert "there are no accounts" in server.log_text()
    assert f"docker push localhost:{server.port}/team/busybox" in server.log_text()
    with running_server(tmp_path, workers=1, listen="[::]:0", env={"ENTREPOT_INSECURE_OPEN": "true"}) as server:
        assert plain_request("GET", f"http://127.0.0.1:{server.port}/v2/").status_code == 200


def test_start_on_every_address_with_an_account(tmp_path: Path) -> None:
    """If the registry has ever had an account, the server starts on all addresses without a warning, even if the
    account was removed."""
    prepare_data_dir(tmp_path / "data")
    asyncio.run(_add_and_remove(tmp_path / "data"))
    with running_server(tmp_path, workers=1, listen="0.0.0.0:0") as server:
        pass
    assert "there are no accounts" not in server.log_text()


async def _add_and_remove(data: Path) -> None:
    async with open_accounts(data) as accounts:
        await accounts.add_account(AccountName("admin"), AccountKind.USER, password_hash=None, admin=True, by=Actor())
        await accounts.remove_account(AccountName("admin"), by=Actor())


@pytest.mark.parametrize(
    ("loopback", "values", "reachable"),
    [
        (True, {}, False),
        (True, {"public_url": "http://localhost:5000"}, False),
        (False, {}, True),
        (True, {"trusted_proxies": ["127.0.0.1"]}, True),
        (True, {"public_url": "https://registry.example.com"}, True),
    ],
)
@pytest.mark.parametrize("requires_login", [True, False])
@pytest.mark.parametrize("insecure", [True, False])
def test_when_an_open_registry_is_refused(
    loopback: bool, values: dict[str, object], reachable: bool, requires_login: bool, insecure: bool
) -> None:
    """The start is refused only if the registry requires no login, other machines reach it directly or through a proxy,
    and `insecure_open` is not set. A registry requires a login if it has or had accounts, or if its settings allow
    external logins."""
    settings = Settings.model_validate({**values, "insecure_open": insecure})
    allowed = not reachable or requires_login or insecure
    with nullcontext() if allowed else pytest.raises(OpenToEveryoneError, match="there are no accounts: add one"):
        check_open_to_everyone(settings, bound_to_loopback=loopback, requires_login=requires_login)


def test_start_behind_a_proxy_without_accounts(tmp_path: Path) -> None:
    """A server whose settings name a proxy does not start without accounts, and says what to do."""
    result = entrepot("serve", "--listen", "127.0.0.1:0", folder=tmp_path, ENTREPOT_TRUSTED_PROXIES="127.0.0.1")
    line = error_line(result, 1)
    assert "trusted_proxies" in line
    assert "`entrepot user add NAME --admin`" in line


def test_banner_has_the_public_url(tmp_path: Path) -> None:
    """With `public_url`, the example of a push in the banner has this address."""
    url = "https://registry.example.com"
    env = {"ENTREPOT_PUBLIC_URL": url + "/", "ENTREPOT_INSECURE_OPEN": "true"}
    with running_server(tmp_path, workers=1, env=env) as server:
        pass
    assert "docker push registry.example.com/team/busybox" in server.log_text()


def test_banner_of_a_mirror(tmp_path: Path) -> None:
    """The banner of a mirror lists the upstreams, and has an example of a pull from the default upstream."""
    with running_server(tmp_path, "--mirror", "docker.io", "--mirror", "ghcr.io", workers=1) as server:
        pass
    text = server.log_text()
    assert "  mirrors   docker.io (default), ghcr.io\n" in text
    assert f"  pull      docker pull {server.address}/ubuntu\n" in text


def test_start_of_a_mirror_without_a_default(tmp_path: Path) -> None:
    """Without a default upstream, the example of a pull in the banner has the name of an upstream."""
    (tmp_path / "a.toml").write_text('[[upstream]]\nname = "ghcr.io"\n')
    with running_server(tmp_path, "--config", "a.toml", workers=1) as server:
        pass
    assert f"  pull      docker pull {server.address}/ghcr.io/NAME\n" in server.log_text()


def test_log_level(tmp_path: Path) -> None:
    """Requests are logged at `info`, and not at `warning`."""
    with running_server(tmp_path / "a", workers=1) as server:
        plain_request("GET", server.url + "/v2/a/tags/list")
    assert "GET /v2/a/tags/list status=404" in server.log_text()
    with running_server(tmp_path / "b", workers=1, env={"ENTREPOT_LOG_LEVEL": "warning"}) as server:
        plain_request("GET", server.url + "/v2/a/tags/list")
    assert "/v2/a/tags/list" not in server.log_text()


def test_port_in_use(tmp_path: Path) -> None:
    """If the port is in use, the error is one line, and no data directory is created."""
    with socket.create_server(("127.0.0.1", 0)) as other_listener:
        listen = f"127.0.0.1:{other_listener.getsockname()[1]}"
        line = error_line(entrepot("serve", "--listen", listen, folder=tmp_path), 1)
    assert line.startswith(f"cannot listen on {listen}: the port is in use")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("listen", ["5000", "127.0.0.1:99999", "no-such-host.invalid:5000", "127.0.0.1:x"])
def test_bad_address(tmp_path: Path, listen: str) -> None:
    """If the server cannot listen on the address, the error is one line."""
    assert listen in error_line(entrepot("serve", "--listen", listen, folder=tmp_path), 1)


def serve_fails(folder: Path, data: Path) -> str:
    """Runs `entrepot serve`, which must fail. Returns its error of one line."""
    return error_line(entrepot("serve", "--listen", "127.0.0.1:0", "--data", data, folder=folder), 1)


def test_data_directory_that_is_a_file(tmp_path: Path) -> None:
    """If the path of the data directory is a file, the error is one line."""
    (tmp_path / "file").touch()
    assert "is not a directory" in serve_fails(tmp_path, tmp_path / "file")


def test_data_directory_that_cannot_be_made(tmp_path: Path) -> None:
    """If the path of the data directory is below a file, the error is one line."""
    (tmp_path / "file").touch()
    assert str(tmp_path / "file" / "data") in serve_fails(tmp_path, tmp_path / "file" / "data")


def test_data_directory_that_cannot_be_written(tmp_path: Path) -> None:
    """If the owner of the data directory may not write to it, the error is one line. This holds for root as well,
    because the server then runs with the uid of the owner."""
    data = tmp_path / "data"
    data.mkdir(mode=0o500)
    os.chown(data, owner := 65534 if os.geteuid() == 0 else os.geteuid(), -1)
    assert data.stat().st_uid == owner
    assert str(data) in serve_fails(tmp_path, data)
    assert list(data.iterdir()) == []


def test_data_directory_of_a_newer_version(tmp_path: Path) -> None:
    """For a database of a newer version, the error is one line, and the database does not change."""
    prepare_data_dir(tmp_path / "data")
    database = tmp_path / "data" / "entrepot.db"
    db = second_connection(database)
    db.pragma("user_version", 9999)
    db.close()
    before = database.read_bytes()
    assert "newer" in serve_fails(tmp_path, tmp_path / "data")
    result = entrepot("inspect", "a", "--data", tmp_path / "data", folder=tmp_path)
    assert "newer" in error_line(result, 1)
    assert database.read_bytes() == before


def test_data_directory_with_a_broken_database(tmp_path: Path) -> None:
    """For a broken database, the error is one line."""
    prepare_data_dir(tmp_path / "data")
    for name in ("entrepot.db-wal", "entrepot.db-shm"):
        (tmp_path / "data" / name).unlink(missing_ok=True)
    (tmp_path / "data" / "entrepot.db").write_bytes(b"not a database " * 1000)
    assert "entrepot.db" in serve_fails(tmp_path, tmp_path / "data")
