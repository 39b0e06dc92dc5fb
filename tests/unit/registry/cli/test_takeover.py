"""The check of a restart: whether the new version can open the addresses in its settings while the old one runs."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from registry.cli.takeover import check_takeover, make_successor
from registry.config import Settings
from registry.config.telemetry_settings import MetricsSettings
from registry.server.gate.listener import address_of, bind
from storage.composition import prepare_data_dir


@pytest.fixture
def data(tmp_path: Path) -> Path:
    prepare_data_dir(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def used() -> Iterator[str]:
    """The address of a socket that listens, as that of a running server."""
    with bind("127.0.0.1:0") as sock:
        yield address_of(sock)


def facts_of(settings: Settings, *sockets: str) -> dict[str, str]:
    """Returns the facts that a server with these settings and sockets passes to its successor."""
    return make_successor(settings, sockets, bound_to_loopback=True).facts


def refusal(settings: Settings, facts: dict[str, str], capsys: pytest.CaptureFixture[str]) -> str:
    """Makes the check, which must refuse the restart. Returns the message."""
    with pytest.raises(typer.Exit):
        check_takeover(settings, facts)
    return capsys.readouterr().err


def everywhere(address: str) -> str:
    """Returns the address that stands for all IPv4 addresses, with the same port."""
    return f"0.0.0.0:{address.rpartition(':')[2]}"


@pytest.mark.parametrize("has_sockets", [True, False], ids=["this version", "older version"])
def test_another_host_on_the_servers_own_port(
    data: Path, used: str, has_sockets: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """If `listen` or `metrics.listen` changes to all addresses and keeps the port, the old workers still use the port.
    The message says that the server has to be stopped and started, and does not blame another program."""
    shared: dict[str, Any] = {"data": data, "workers": 2, "insecure_open": True}
    for old, new in (
        (Settings(**shared, listen=used), Settings(**shared, listen=everywhere(used))),
        (
            Settings(**shared, metrics=MetricsSettings(listen=used)),
            Settings(**shared, metrics=MetricsSettings(listen=everywhere(used))),
        ),
    ):
        # The sockets of the server: the registry's, and that of the metrics if they have an address of their own.
        facts = facts_of(old, *((used,) if old.metrics.listen is None else (old.listen, used)))
        if not has_sockets:
            del facts["sockets"]  # an older version does not pass them
        message = refusal(new, facts, capsys)
        assert "takes effect only if you stop the server and start it again (systemctl restart" in message
        assert "another program" not in message


def test_a_port_that_another_program_uses(data: Path, used: str, capsys: pytest.CaptureFixture[str]) -> None:
    """If another program uses the new port, the message says so."""
    old = Settings(data=data, workers=2, listen="127.0.0.1:0")
    message = refusal(Settings(data=data, workers=2, listen=used), facts_of(old, "127.0.0.1:1"), capsys)
    assert "the port is in use by another program" in message


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_another_program_on_the_servers_port_of_another_host(
    data: Path, used: str, host: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The server listens on the same port of another host, and another program on the new address. The message names
    that program, because a stop and a start of the server would fail as well."""
    port = used.rpartition(":")[2]
    old, new = (Settings(data=data, workers=2, listen=f"{each}:{port}") for each in ("127.0.0.2", host))
    message = refusal(new, facts_of(old, f"127.0.0.2:{port}"), capsys)
    assert "the port is in use by another program" in message


def test_name_of_the_servers_own_host(data: Path, used: str, capsys: pytest.CaptureFixture[str]) -> None:
    """If `listen` changes from an address to a host name of the same address, the message says that the running server
    itself uses the port."""
    port = used.rpartition(":")[2]
    old, new = (Settings(data=data, workers=2, listen=f"{host}:{port}") for host in ("127.0.0.1", "localhost"))
    message = refusal(new, facts_of(old, used), capsys)
    assert f"the running server itself uses port {port}" in message


def test_metrics_on_the_port_of_a_socket_of_systemd(data: Path, used: str, capsys: pytest.CaptureFixture[str]) -> None:
    """If systemd has opened the registry's socket, `listen` does not name its port. The metrics may not get the same
    port on another host: the server would take requests to the registry for requests to the metrics."""
    port = used.rpartition(":")[2]
    settings = Settings(data=data, workers=2, metrics=MetricsSettings(listen=f"127.0.0.2:{port}"))
    message = refusal(settings, facts_of(Settings(data=data, workers=2), used), capsys)
    assert f"port {port} is the registry's own" in message


def test_registry_moves_to_the_port_of_the_metrics(data: Path, used: str, capsys: pytest.CaptureFixture[str]) -> None:
    """If the metrics keep their address, `listen` may not change to their port on another host."""
    port = used.rpartition(":")[2]
    old, new = (
        Settings(data=data, workers=2, listen=listen, metrics=MetricsSettings(listen=used))
        for listen in ("127.0.0.1:0", f"127.0.0.2:{port}")
    )
    message = refusal(new, facts_of(old, "127.0.0.1:1", used), capsys)
    assert f"port {port} is the registry's own" in message


def test_a_host_that_does_not_overlap(data: Path, used: str) -> None:
    """On the same port of another host, the new version can listen while the old one runs."""
    port = used.rpartition(":")[2]
    old, new = (Settings(data=data, workers=2, listen=f"127.0.0.{number}:{port}") for number in (1, 2))
    check_takeover(new, facts_of(old, used))
    with socket.create_server(("127.0.0.2", int(port))):  # the check has closed its socket
        pass
