"""The steps of `entrepot restart`, which replaces a running server by a new version of the program:

1. The old version describes itself and the command of the new version (`make_successor`).
2. A second process runs the new version, which checks whether it can take over (`check_takeover`).
3. The old version's process executes the new version, which gets the open sockets (`listening_sockets`).

`listening_sockets` also opens the sockets at an ordinary start."""

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
"""The end of error messages about a setting whose change takes effect only after a stop and a start."""


def make_successor(settings: Settings, addresses: Sequence[str], *, bound_to_loopback: bool) -> Successor:
    """Returns the command line of the new version, which is the same as that of this process, and the facts that
    `check_takeover` needs about this server. `addresses`: the addresses of all sockets on which the server listens, in
    the order of `Handover.sockets`. `bound_to_loopback`: whether only this machine can connect to the server's
    port."""
    arguments = sys.argv[1:]
    command = sys.orig_argv[1:]
    if not arguments or command[-len(arguments) :] != arguments:
        # `sys.orig_argv` does not end with the arguments of `entrepot`, so it cannot be used.
        command = ["-m", "registry", *arguments]
    metrics = metrics_address(settings) or ""
    facts = {
        "data": str(settings.data.absolute()),
        "listen": settings.listen,
        "metrics": metrics,
        "sockets": " ".join(addresses),
        "loopback": "yes" if bound_to_loopback else "no",
    }
    return Successor([sys.executable, *command], facts)


def check_takeover(settings: Settings, facts: dict[str, str]) -> None:
    """Checks whether this version can take over from the running server. Ends the command with an error message if it
    cannot. `facts`: the facts from `make_successor` of the running server. Raises DataDirectoryError."""
    from registry.app import create_app
    from registry.cli.server_preparation import prepare_server
    from registry.client_addresses import is_loopback_address
    from registry.server.gate.listener import ListenError, address_of, bind

    if str(settings.data.absolute()) != facts["data"]:
        fail("the setting `data` takes effect only if you stop the server and start it again")
    if settings.workers < 2:
        fail("the setting `workers` cannot become 1 in a restart: stop the server and start it again")
    # The setting `listen` does not tell whether only this machine can connect to the server's port: if systemd has
    # opened the server's socket, the setting has no effect.
    bound_to_loopback = facts.get("loopback") == "yes"
    metrics = metrics_address(settings)
    server_addresses = _server_addresses(facts)
    addresses = server_addresses[:-1] if facts["metrics"] else server_addresses
    with ExitStack() as stack:
        try:
            if settings.listen != facts["listen"]:
                sock = stack.enter_context(bind(settings.listen))
                bound_to_loopback = is_loopback_address(sock.getsockname()[0])
                addresses = [address_of(sock)]
            if metrics is not None:
                is_unchanged = metrics == facts["metrics"]
                check_metrics_port(
                    addresses, server_addresses[-1] if is_unchanged else address_of(stack.enter_context(bind(metrics)))
                )
        except ListenError as error:
            _fail_with_listen_error(error, server_addresses)
    prepare_server(settings, bound_to_loopback=bound_to_loopback, may_migrate=False)
    create_app(settings)


def _server_addresses(facts: dict[str, str]) -> list[str]:
    """Returns the addresses of the running server's sockets. The address of the socket for the metrics, if there is
    one, comes last. Older versions have no fact `sockets`: for these, returns the addresses in the server's
    settings."""
    if "sockets" in facts:
        return facts["sockets"].split()
    return [facts["listen"], *filter(None, [facts["metrics"]])]


def _fail_with_listen_error(error: ListenError, server_addresses: Sequence[str]) -> NoReturn:
    """Ends the command with a message for `error`, which `check_takeover` got when it opened a new address.
    `server_addresses`: the addresses of the running server's sockets. In two cases, the message advises to stop and
    start the server:

    - The new address overlaps with an address of the running server, as `0.0.0.0:5000` overlaps with `127.0.0.1:5000`.
    - The new address has a port of the running server, and this process lacks the permission to open the port. For
      example, only root may open port 443, and root started the server, but the server now runs as another user."""
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
    """Returns the port of an address such as `[::1]:5000`; None for an address without a port."""
    port = address.rpartition(":")[2]
    return int(port) if port.isdecimal() else None


def check_metrics_port(addresses: Sequence[str], metrics: str) -> None:
    """Ends the command with an error message if the registry and the metrics have the same port. The server recognizes
    requests for the metrics by the port. `addresses`: the addresses of the registry's open sockets. `metrics`: the
    address of the open socket for the metrics. (`check_ports` compares the settings instead; they do not contain the
    port of a socket that systemd has opened.)"""
    if any(_port(address) == _port(metrics) for address in addresses):
        fail(f"port {_port(metrics)} is the registry's own: set metrics.listen to another port")


def metrics_address(settings: Settings) -> str | None:
    """Returns the address of the port that serves only the metrics; None if there is no such port."""
    return settings.metrics.listen if settings.metrics.enabled else None


def listening_sockets(
    settings: Settings, handover: Handover | None
) -> tuple[list[socket.socket], socket.socket | None]:
    """Returns the sockets that serve the registry, and the socket that serves only the metrics (None if there is none).
    `handover`: the data from the old version; None at an ordinary start.

    - With a handover, returns the old version's sockets. But if an address has changed in the settings, closes the old
      sockets for it and opens a new one.
    - Without a handover, returns the sockets that systemd has opened. If systemd has opened none, opens a new one. The
      socket for the metrics is always a new one.

    Ends the command with an error message if a socket cannot be opened."""
    from registry.server.gate.listener import ListenError, bind
    from registry.server.process.systemd import listening_socket, take_activated_sockets

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
        return take_activated_sockets(os.environ) or [bind(settings.listen)], _bind_metrics(settings)
    except ListenError as error:
        fail(error.message)
    except (OSError, ValueError) as error:
        fail(f"cannot use the socket that this process was given: {error}")


def _bind_metrics(settings: Settings) -> socket.socket | None:
    """Opens the socket for the metrics; None if the settings name no address for them. Raises ListenError."""
    from registry.server.gate.listener import bind

    address = metrics_address(settings)
    return None if address is None else bind(address)
