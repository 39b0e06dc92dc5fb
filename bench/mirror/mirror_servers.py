"""The two mirrors under test, each made for an upstream's address."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from bench.loaders.http_client import HOST
from bench.system.servers import DOCKER_REGISTRY, ENTREPOT, ServerProgram, entrepot_checkout, entrepot_command

HOSTED_PREFIX = "team"
"""Names under it are Entrepot's own."""


@dataclass(frozen=True)
class MirrorProgram:
    """A program that mirrors: what it is called, and how it is started before an upstream's address."""

    name: str
    version: Callable[[], str]
    of: Callable[[str], ServerProgram]
    hosts: bool = True
    """Images can be pushed to it as well, and it fetches a blob once for all its clients."""


def _entrepot_before(upstream: str, kind: ServerProgram = ENTREPOT) -> ServerProgram:
    """The defaults, two workers; what is configured is the upstream, and a prefix to push to."""

    def command(folder: Path, port: int) -> list[str]:
        path = folder / "config.toml"
        path.write_text(
            f'[[upstream]]\nname = "docker.io"\nendpoints = ["{upstream}"]\ndefault = true\n\n'
            f'[hosted]\nprefixes = ["{HOSTED_PREFIX}/**"]\n'
        )
        return [*entrepot_command(folder, port), "--config", str(path)]

    return replace(kind, command=command)


def _docker_registry_before(upstream: str) -> ServerProgram:
    """Debian's set-up as in the other rows, with `proxy`."""

    def command(folder: Path, port: int) -> list[str]:
        started = DOCKER_REGISTRY.command(folder, port)
        path = Path(started[-1])
        path.write_text(json.dumps({**json.loads(path.read_text()), "proxy": {"remoteurl": upstream}}))
        return started

    return replace(DOCKER_REGISTRY, command=command)


ENTREPOT_AS_MIRROR = MirrorProgram(ENTREPOT.name, ENTREPOT.version, _entrepot_before)
DOCKER_REGISTRY_AS_MIRROR = MirrorProgram(
    DOCKER_REGISTRY.name, DOCKER_REGISTRY.version, _docker_registry_before, hosts=False
)


def mirror_checkout(root: Path) -> MirrorProgram:
    """The Entrepot of another checkout. Raises BenchFailed for a folder that holds none."""
    kind = entrepot_checkout(root)
    return MirrorProgram(kind.name, kind.version, lambda upstream: _entrepot_before(upstream, kind))


def local_url(port: int) -> str:
    """Of a server on this machine."""
    return f"http://{HOST}:{port}"
