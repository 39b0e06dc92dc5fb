"""The commands `entrepot reload` and `entrepot restart`, which change a running server."""

from __future__ import annotations

from registry.cli.options import ConfigOption, DataOption, fail, load_or_fail, one_line_errors
from registry.cli.output import print_line
from registry.config import Settings

RELOAD_HELP = "Make the running server use its changed settings, without a pause."
RELOAD_EXAMPLES = """\b
Examples:
  entrepot reload
  entrepot reload --data /srv/entrepot

The server reads its settings file again. It keeps the flags and environment variables with which it was started. If one
value is wrong, or cannot change while the server runs, the command says which one, and nothing changes. SIGHUP to the
server does the same."""
RESTART_HELP = "Replace the program and the workers of the running server, without a pause."
RESTART_EXAMPLES = """\b
Examples:
  entrepot restart
  entrepot restart --data /srv/entrepot

A newly installed version takes over, and settings that need a restart take effect. Pulls and pushes that run are
finished by the old workers. SIGUSR2 to the server does the same."""


def reload(config: ConfigOption = None, data: DataOption = None) -> None:
    """Asks the server for a reload, waits until the reload has ended, and prints the outcome."""
    _send_request(load_or_fail(config, data=data).settings, "reload")


def restart(config: ConfigOption = None, data: DataOption = None) -> None:
    """Asks the server for a restart, waits until the restart has ended, and prints the outcome."""
    _send_request(load_or_fail(config, data=data).settings, "restart")


def _send_request(settings: Settings, action: str) -> None:
    """Sends the request `action` to the server that uses the data directory, and prints the response. If no server uses
    the data directory, or if the server refuses the request, prints the reason and ends the command with exit code 1.

    Does not switch from root to the owner of the data directory, because it creates no files, and the owner may have no
    access to a parent directory. For example, systemd with DynamicUser puts the data directory below /var/lib/private,
    which only root can enter."""
    from registry.server.process.control_socket import ControlUnavailable, ask_server
    from storage.composition import layout_of

    with one_line_errors():
        try:
            response = ask_server(layout_of(settings.data).control, {"do": action})
        except ControlUnavailable as error:
            fail(error.message)
        if not response["ok"]:
            fail(response["message"])
        print_line(response["message"])
