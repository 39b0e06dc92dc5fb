"""Functions with which `entrepot serve` takes over from the running version of the server at `entrepot restart`. First,
the new version checks in a process of its own whether it can take over. Then it replaces the old version in the old
version's process. The module also provides the sockets to listen on: those of the old version, those from systemd, or
new ones."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, NoReturn

from registry.cli.options import fail
from registry.config import Settings
from registry.server.process.successor import Handover, Successor

if TYPE_CHECKING:
    from registry.server.gate.listener import ListenError

STOP_AND_START = "stop the server and start it again (systemctl restart entrepot, or docker restart)"
"""The advice in error texts about a changed setting that neither a reload nor `entrepot restart` can apply."""


def successor(settings: Settings, addresses: Sequence[str], *, bound_to_loopback: bool) -> Successor:
    """Returns the program that takes over at a restart: this command, with the same arguments as this process.
    `addresses`: the addresses of all sockets on which the server listens, in the order of `Handover.sockets`.
    `bound_to_loopback`: whether only this machine can connect to the server's port."""
    arguments = sys.argv[1:]
    command = sys.orig_argv[1:]
    if not arguments or command[-len(arguments) :] != arguments:
        # The interpreter's command line does not end with the arguments of this command: build a new one.
        command = ["-m", "registry", *arguments]
    metrics = metrics_address(settings) or ""
    # `check_takeover` of the new process compares these facts with its own settings.
    facts = {
        "data": str(settings.data.absolute()),
        "listen": settings.listen,
        "metrics": metrics,
        "sockets": " ".join(addresses),
        "loopback": "yes" if bound_to_loopback else "no",
    }
    return Successor([sys.executable, *command], facts)


def check_takeover(settings: Settings, facts: dict[str, str]) -> None:
    """Checks whether this version can take over from a running server, as far as a check is possible while that server
    runs. `facts`: the data directory and the addresses of the running server. Ends the command with an error message if
    this version cannot take over. Raises DataDirectoryError."""
    from registry.app import create_app
    from registry.cli.server_preparation import prepare
    from registry.client_addresses import is_loopback
    from registry.server.gate.listener import ListenError, address_of, bind

    if str(settings.data.absolute()) != facts["data"]:
        fail("the setting `data` takes effect only if you stop the server and start it again")
    if settings.workers < 2:
        fail("the setting `workers` cannot become 1 in a restart: stop the server and start it again")
    # Not from the setting `listen`, which has no effect if systemd has opened the server's socket.
    bound_to_loopback = facts.get("loopback") == "yes"
    metrics = metrics_address(settings)
    server_addresses = _server_addresses(facts)
    addresses = server_addresses[:-1] if facts["metrics"] else server_addresses
    with ExitStack() as stack:
        try:
            if settings.listen != facts["listen"]:
                sock = stack.enter_context(bind(settings.listen))
                bound_to_loopback = is_loopback(sock.getsockname()[0])
                addresses = [address_of(sock)]
            if metrics is not None:
                is_unchanged = metrics == facts["metrics"]
                check_metrics_port(
                    addresses, server_addresses[-1] if is_unchanged else address_of(stack.enter_context(bind(metrics)))
                )
        except ListenError as error:
            _fail_to_listen(error, server_addresses)
    prepare(settings, bound_to_loopback=bound_to_loopback, may_migrate=False)
    create_app(settings)


def _server_addresses(facts: dict[str, str]) -> list[str]:
    """Returns the addresses of the running server's sockets. If it has a socket for the metrics, its address is the
    last one. For a server of an older version, which does not report its sockets, returns the addresses in its
    settings."""
    if "sockets" in facts:
        return facts["sockets"].split()
    return [facts["listen"], *filter(None, [facts["metrics"]])]


def _fail_to_listen(error: ListenError, server_addresses: Sequence[str]) -> NoReturn:
    """Ends the command with an error message, because the check of a restart could not open a socket.
    `server_addresses`: the addresses of the running server's sockets.

    Two causes disappear only if the server is stopped and started:

    - The new address overlaps with one of the running server, whose sockets stay open until the restart is complete.
      For example, `0.0.0.0:5000` overlaps with `127.0.0.1:5000`.
    - The new address has another host, but the same port, and this process may not open the port. For example, only
      root may open port 443: the server was started by root, but does not run as root any more."""
    from registry.server.gate.listener import overlaps

    used_address, forbidden_port = error.used_address, error.forbidden_port
    for address in server_addresses:
        if (used_address is not None and overlaps(used_address, address)) or (
            forbidden_port is not None and _port(address) == forbidden_port
        ):
            fail(
                f"the running server itself uses port {_port(address)}, so the new address takes effect only if you "
                f"{STOP_AND_START}"
            )
    fail(error.message)


def _port(address: str) -> int | None:
    """Returns the port of an address such as `[::1]:5000`; None if it has none."""
    port = address.rpartition(":")[2]
    return int(port) if port.isdecimal() else None


def check_metrics_port(addresses: Sequence[str], metrics: str) -> None:
    """Ends the command with an error message if a socket of the registry has the same port as the socket for the
    metrics: the server distinguishes them by their ports. `addresses`, `metrics`: the addresses of open sockets.
    `check_ports` compares only the settings, which do not have the port of a socket that systemd has opened."""
    if any(_port(address) == _port(metrics) for address in addresses):
        fail(f"port {_port(metrics)} is the registry's own: give metrics.listen another port")


def metrics_address(settings: Settings) -> str | None:
    """Returns the address of the port that serves only the metrics; None if there is no such port."""
    return settings.metrics.listen if settings.metrics.enabled else None


def listening_sockets(
    settings: Settings, handover: Handover | None
) -> tuple[list[socket.socket], socket.socket | None]:
    """Returns the sockets to listen on, and the socket that serves only the metrics, or None if there is none.
    `handover`: the data that the old version hands over to this one; None at an ordinary start.

    - With a handover, takes over the sockets of the old version. If it has a socket for the metrics, this is the last
      one. Opens new sockets for the addresses that have changed in the settings, and closes the old ones.
    - Without a handover, uses the sockets that systemd has opened; if there are none, opens a new one. Opens the socket
      for the metrics, which never comes from systemd.

    Ends the command with an error message if a socket cannot be opened."""
    from registry.server.gate.listener import ListenError, bind
    from registry.server.process.systemd import activated_sockets, listening_socket

    try:
        if handover is not None:
            sockets = [listening_socket(file) for file in handover.sockets]
            old_metrics_address = handover.facts.get("metrics") or None
            old_metrics_socket = sockets.pop() if old_metrics_address else None
            if old_metrics_socket is not None and old_metrics_address != metrics_address(settings):
                old_metrics_socket.close()
                old_metrics_socket = None
            if settings.listen != handover.facts["listen"]:
                for sock in sockets:
                    sock.close()
                sockets = [bind(settings.listen)]
            return sockets, old_metrics_socket or _bind_metrics(settings)
        return activated_sockets(os.environ) or [bind(settings.listen)], _bind_metrics(settings)
    except ListenError as error:
        fail(error.message)
    except (OSError, ValueError) as error:
        fail(f"cannot use the socket that this process was given: {error}")


def _bind_metrics(settings: Settings) -> socket.socket | None:
    """Opens the socket for the metrics; None if the settings name no address for them. Raises ListenError."""
    from registry.server.gate.listener import bind

    address = metrics_address(settings)
    return None if address is None else bind(address)
