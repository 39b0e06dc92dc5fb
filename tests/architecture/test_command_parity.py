"""The commands and the API can do the same."""

from __future__ import annotations

from tests.system.admin.test_api_refusals import ROUTES
from tests.system.cli.test_command import EVERY_COMMAND

NOT_ABOUT_ACCOUNTS = {
    "serve",
    "reload",  # whoever may change the settings file runs it
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
    "import",
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
    "restore": ("GET", "/backups"),  # `restore --list`; what is restored is not a running server
    "import": ("POST", "/imports/remote"),
    "import-registry": ("POST", "/imports/directory"),
}

ONLY_API = {
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
    ("GET", "/me"),  # there is nobody at the command line who would have to ask
    ("GET", "/robots/{name}"),  # `robot list` and `grant list --for` show it
    ("GET", "/groups/{name}"),  # `group list` shows it
    ("POST", "/scrub"),  # `scrub` itself, a group of commands that runs
    ("GET", "/damaged"),  # `scrub status` shows it
    ("GET", "/activity"),  # for the pages; programs that watch the server read its metrics
    ("GET", "/search"),  # a person at the command line can list everything with other programs
    ("GET", "/events/deliveries"),  # `events list --dead` and `--pending` show it
}


def test_every_command_has_a_twin() -> None:
    """And every route belongs to a command, but for what a person at the command line has no use for."""
    assert set(EVERY_COMMAND) == set(TWINS) | NOT_ABOUT_ACCOUNTS
    assert set(ROUTES) == set(TWINS.values()) | ONLY_API
