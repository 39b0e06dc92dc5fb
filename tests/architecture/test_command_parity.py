"""Checks that the management API has a route for each command, and that there is a command for each route. The module
lists the exceptions, most with a reason."""

from __future__ import annotations

from tests.system.admin.test_api_refusals import ROUTES
from tests.system.cli.test_command import EVERY_COMMAND

COMMANDS_WITHOUT_ROUTE = {
    "serve",
    "reload",  # it is run by people who can change the settings file
    "restart",
    "config",
    "inspect",
    "client docker",  # the clients' files are on other machines
    "client containerd",
    "client podman",
    "client buildkit",
    "client check",
    "doctor",  # it looks at the machine, also while no server runs
    "mirror test",
    "tag delete",  # clients use DELETE in /v2
    "export",  # clients pull and push instead
    "import-config",
}

ROUTE_OF_COMMAND = {
    "user add": ("POST", "/users"),
    "user list": ("GET", "/users"),
    "user show": ("GET", "/users/{name}"),
    "user password": ("PUT", "/users/{name}/password"),
    "user disable": ("PATCH", "/users/{name}"),
    "user enable": ("PATCH", "/users/{name}"),
    "user admin": ("PATCH", "/users/{name}"),
    "user remove": ("DELETE", "/users/{name}"),
    "user sessions": ("GET", "/sessions"),
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
    "grant explain": ("GET", "/rights"),
    "grant remove": ("DELETE", "/grants"),
    "key rotate": ("POST", "/keys"),
    "key list": ("GET", "/keys"),
    "audit": ("GET", "/audit"),
    "events list": ("GET", "/events"),
    "events tail": ("GET", "/events"),
    "events retry": ("POST", "/events/retry"),
    "status": ("GET", "/status"),
    "mirror status": ("GET", "/mirror"),
    "mirror warm": ("POST", "/mirror/warm"),
    "mirror refresh": ("POST", "/mirror/refresh"),
    "mirror purge": ("POST", "/mirror/purge"),
    "mirror freeze": ("PUT", "/mirror/frozen"),
    "mirror unfreeze": ("DELETE", "/mirror/frozen"),
    "mirror frozen": ("GET", "/mirror/frozen"),
    "jobs list": ("GET", "/jobs"),
    "jobs show": ("GET", "/jobs/{job}"),
    "jobs stop": ("POST", "/jobs/{job}/stop"),
    "tag history": ("GET", "/repositories/{name}/tags/{tag}/history"),
    "tag restore": ("POST", "/repositories/{name}/tags/{tag}/restore"),
    "tag move": ("PUT", "/repositories/{name}/tags/{tag}"),
    "cache status": ("GET", "/cache"),
    "cache evict": ("POST", "/cache/evict"),
    "quota list": ("GET", "/quotas"),
    "retention preview": ("GET", "/retention/preview"),
    "retention apply": ("POST", "/retention"),
    "gc": ("POST", "/gc"),
    "fsck": ("POST", "/fsck"),
    "scrub status": ("GET", "/scrub"),
    "scrub quarantine list": ("GET", "/quarantine"),
    "scrub quarantine delete": ("DELETE", "/quarantine/{digest}"),
    "backup": ("POST", "/backups"),
    "restore": ("GET", "/backups"),  # only for `restore --list`: a server cannot restore its own data while it runs
    "import": ("POST", "/imports/remote"),  # only for `import URL`: images in files may be on another machine
    "import-registry": ("POST", "/imports/directory"),
}

ROUTES_WITHOUT_COMMAND = {
    ("DELETE", "/sessions"),  # `user sessions --end-all`
    ("DELETE", "/sessions/{id}"),  # `user sessions --end`
    ("GET", "/repositories/{name}/tag-list"),  # for the pages; `inspect` shows images
    ("GET", "/repositories/{name}/manifests/{reference}/details"),
    ("GET", "/repositories/{name}/manifests/{reference}/raw"),
    ("GET", "/repositories/{name}/manifests/{reference}/config"),
    ("GET", "/repositories/{name}/manifests/{reference}/referrers"),
    ("GET", "/repositories/{name}/manifests/{reference}/files"),
    ("GET", "/repositories/{name}/comparison"),
    ("GET", "/repositories/{name}/manifests/{reference}/archive"),
    ("GET", "/repositories/{name}/tag-history"),
    ("POST", "/repositories/{name}/tag-removal-plan"),
    ("POST", "/repositories/{name}/tag-removal"),
    ("POST", "/repositories/{name}/tag-restoration"),
    ("GET", "/repositories/{name}/description"),
    ("PUT", "/repositories/{name}/description"),
    ("GET", "/retention/repositories"),  # for the page; `retention preview` counts over all repositories
    ("GET", "/mirror/downloads"),  # `mirror status` shows them
    ("GET", "/mirror/images"),  # for the page; `cache evict --dry-run` lists them in its order
    ("GET", "/me"),  # about the account that is logged in; the command line needs no login
    ("GET", "/robots/{name}"),  # `robot list` and `grant list --for` show it
    ("GET", "/groups/{name}"),  # `group list` shows it
    ("POST", "/scrub"),  # the command `scrub`, which is also a group of commands and so not in the list
    ("GET", "/damaged"),  # `scrub status` shows it
    ("GET", "/activity"),  # for the pages; programs that watch the server read its metrics
    ("GET", "/search"),  # a person at the command line can list everything with other programs
    ("GET", "/events/deliveries"),  # `events list --dead` and `--pending` show it
}


def test_every_command_has_an_api_route() -> None:
    """Every command has a route of the API, and every route has a command, except those in the lists of exceptions. No
    command or route is an exception without need."""
    assert set(EVERY_COMMAND) == set(ROUTE_OF_COMMAND) | COMMANDS_WITHOUT_ROUTE
    assert set(ROUTES) == set(ROUTE_OF_COMMAND.values()) | ROUTES_WITHOUT_COMMAND
    assert set(ROUTE_OF_COMMAND) & COMMANDS_WITHOUT_ROUTE == set()
    assert set(ROUTE_OF_COMMAND.values()) & ROUTES_WITHOUT_COMMAND == set()
