"""The results of the compatibility tests: which steps work with which container client. tests/deploy/compatibility
records them; docs/en/compatibility.md shows them.

The results of each Debian release are in a file in tests/data/compatibility. `make compatibility` records them again.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.fakes.deployment.debian_root import RELEASES
from tests.fakes.server_process import ROOT

RESULTS = ROOT / "tests" / "data" / "compatibility"
PAGE = ROOT / "docs" / "en" / "compatibility.md"
STEPS = ("push", "pull", "mirror")


@dataclass(frozen=True)
class ClientToTry:
    """A client of the table: the steps that it can do, and the settings that it needs besides the registry's
    address."""

    steps: tuple[str, ...]
    settings: str
    without: str = ""
    """The Debian release that does not have the client; empty: both have it."""


CLIENTS = {
    "docker": ClientToTry(STEPS, "the mirror by `entrepot client docker`"),
    "BuildKit": ClientToTry(STEPS, "as docker"),
    "podman": ClientToTry(
        STEPS, "`--tls-verify=false` for plain HTTP; `registries.conf` for the mirror (`entrepot client podman`)"
    ),
    "buildah": ClientToTry(STEPS, "as podman"),
    "skopeo": ClientToTry(STEPS, "as podman"),
    "containerd": ClientToTry(STEPS, "`--plain-http` of `ctr`; the mirror by `entrepot client containerd`"),
    "Helm": ClientToTry(("push", "pull"), "`--plain-http` for plain HTTP"),
    "oras": ClientToTry(("push", "pull"), "`--plain-http` for plain HTTP", without="bookworm"),
    "oras in Python": ClientToTry(("push", "pull"), "`insecure` for plain HTTP"),
    "cosign": ClientToTry(("push", "pull"), "none: it signs and verifies images here", without="bookworm"),
}

_TOP = """# Compatibility

`make compatibility` writes the first table: real clients on plain Debian 12 and 13 push, pull what somebody else has
pushed, and pull an image of Docker Hub through the mirror. `make test-deploy` runs the same clients, and fails if one
does not work any more.

## Clients

| Client | Version | On | Push | Pull | Mirror | Settings |
|---|---|---|---|---|---|---|
"""
_BOTTOM = """
*Mirror*: a name of Docker Hub, such as `ubuntu:18.04`, comes through the registry, with the file that the command
prints. Clients without a setting for that have no entry; they can name the registry's address instead
(`registry.example.com/docker.io/library/ubuntu`). docker trusts plain HTTP on the registry's own machine. With TLS, no
client needs a setting to push and pull.

BuildKit is the one in docker. Helm is Helm's own code in the Python package `helm-python-sdk`, whose version this is.
*oras in Python* is the package `oras`. k3s, kind and Kubernetes pull with containerd.

## Clients that were not tried

The tests cannot run crane, regctl, nerdctl, and the programs `helm` and `buildkitd`: neither Debian 12 or 13 nor PyPI
has them. They use the same API.

## Python

| Python | Tried |
|---|---|
| 3.11 | every test, on Debian 12 |
| 3.12 | `make check`, by hand before a release: `make check VENV=.venv-3.12 PYTHON=python3.12` |
| 3.13 | the quick tests, the server, `pip install` and all clients above, on Debian 13 |

3.14 could not be tried yet.

## Systems

Linux on amd64. Debian 12 and 13 are tried with nothing but Python and make.
"""


def debian_release() -> str:
    """Returns the code name of the Debian release on this machine."""
    return platform.freedesktop_os_release().get("VERSION_CODENAME", "")


def clients_of(release: str) -> list[str]:
    """Returns the clients that can be tried on a Debian release."""
    return [name for name, about in CLIENTS.items() if about.without != release]


@dataclass
class ClientResult:
    """The results of one client on one Debian release: `works` or `fails` for each of its steps."""

    client: str
    version: str
    steps: dict[str, str]


def save(results: Iterable[ClientResult], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [asdict(result) for result in sorted(results, key=lambda result: result.client.lower())]
    for row in rows:
        row["steps"] = dict(sorted(row["steps"].items()))
    file.write_text(json.dumps(rows, indent=2) + "\n")


def load(file: Path) -> list[ClientResult]:
    return [ClientResult(**row) for row in json.loads(file.read_text())]


def page() -> str:
    """Returns the text of docs/en/compatibility.md."""
    rows = [(result, name) for name in RELEASES for result in load(RESULTS / f"{name}.json")]
    rows.sort(key=lambda row: list(CLIENTS).index(row[0].client))
    return _TOP + "".join(map(_line, *zip(*rows, strict=True))) + _BOTTOM


def _line(result: ClientResult, debian: str) -> str:
    cell_text = {"works": "yes", "fails": "no", None: ""}
    cells = [result.client, result.version, f"Debian {RELEASES[debian]}"]
    cells += [cell_text[result.steps.get(step)] for step in STEPS]
    return f"| {' | '.join([*cells, CLIENTS[result.client].settings])} |\n"


if __name__ == "__main__":
    PAGE.write_text(page())
