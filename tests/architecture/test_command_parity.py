"""The commands and the API can do the same."""

from __future__ import annotations

from tests.system.admin.test_api_refusals import ROUTES
from tests.system.cli.test_command import EVERY_COMMAND

NOT_ABOUT_ACCOUNTS = {
    "serve",
    "config",
    "inspect",
    "client",
    "mirror warm",
    "mirror status",
    "mirror refresh",
    "mirror purge",
    "import-config",
}

TWINS = {
    "user add": ("POST", "/users"),
    "user list": ("GET", "/users"),
    "user show": ("GET", "/users/{name}"),
    "user password": ("PUT", "/users/{name}/password"),
    "user disable": ("PATCH", "/users/{name}"),
    "user enable": ("PATCH", "/users/{name}"),
    "user admin": ("PATCH", "/users/{name}"),
    "user remove": ("DELETE", "/users/{name}"),
    "robot add": ("POST", "/robots"),
    "robot list": ("GET", "/robots"),
    "robot disable": ("PATCH", "/robots/{name}"),
    "robot enable": ("PATCH", "/robots/{name}"),
    "robot remove": ("DELETE", "/robots/{name}"),
    "token add": ("POST", "/tokens"),
    "token list": ("GET", "/tokens"),
    "token revoke": ("DELETE", "/tokens/{id}"),
    "group add": ("POST", "/groups"),
    "group list": ("GET", "/groups"),
    "group remove": ("DELETE", "/groups/{name}"),
    "group join": ("PUT", "/groups/{name}/members/{member}"),
    "group leave": ("DELETE", "/groups/{name}/members/{member}"),
    "grant add": ("PUT", "/grants"),
    "grant list": ("GET", "/grants"),
    "grant remove": ("DELETE", "/grants"),
    "key rotate": ("POST", "/keys"),
    "key list": ("GET", "/keys"),
    "audit": ("GET", "/audit"),
    "import": ("POST", "/imports/remote"),
    "import-registry": ("POST", "/imports/directory"),
}

ONLY_API = {
    ("GET", "/me"),  # there is nobody at the command line who would have to ask
    ("GET", "/robots/{name}"),  # `robot list` and `grant list --for` show it
    ("GET", "/groups/{name}"),  # `group list` shows it
}


def test_every_command_has_a_twin() -> None:
    """And every route belongs to a command, but for what a person at the command line has no use for."""
    assert set(EVERY_COMMAND) == set(TWINS) | NOT_ABOUT_ACCOUNTS
    assert set(ROUTES) == set(TWINS.values()) | ONLY_API
