"""The two mirrors under test, each made for an upstream's address."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from bench.servers import ENTREPOT, RIVAL, Kind, entrepot_at, entrepot_command
from bench.wire import HOST

HOSTED = "team"
"""Names under it are Entrepot's own."""


@dataclass(frozen=True)
class MirrorKind:
    """A program that mirrors: what it is called, and how it is started before an upstream's address."""

    name: str
    version: Callable[[], str]
    of: Callable[[str], Kind]
    hosts: bool = True
    """Images can be pushed to it as well, and it fetches a blob once for all its clients."""


def _entrepot_of(upstream: str, kind: Kind = ENTREPOT) -> Kind:
    """The defaults, two workers; what is configured is the upstream, and a prefix to push to."""

    def command(folder: Path, port: int) -> list[str]:
        path = folder / "config.toml"
        path.write_text(
            f'[[upstream]]\nname = "docker.io"\nendpoints = ["{upstream}"]\ndefault = true\n\n'
            f'[hosted]\nprefixes = ["{HOSTED}/**"]\n'
        )
        return [*entrepot_command(folder, port), "--config", str(path)]

    return replace(kind, command=command)


def _rival_of(upstream: str) -> Kind:
    """Debian's set-up as in the other rows, with `proxy`."""

    def command(folder: Path, port: int) -> list[str]:
        started = RIVAL.command(folder, port)
        path = Path(started[-1])
        path.write_text(json.dumps({**json.loads(path.read_text()), "proxy": {"remoteurl": upstream}}))
        return started

    return replace(RIVAL, command=command)


OURS = MirrorKind(ENTREPOT.name, ENTREPOT.version, _entrepot_of)
PEER = MirrorKind(RIVAL.name, RIVAL.version, _rival_of, hosts=False)


def mirror_at(root: Path) -> MirrorKind:
    """The Entrepot of another checkout. Raises BenchFailed for a folder that holds none."""
    kind = entrepot_at(root)
    return MirrorKind(kind.name, kind.version, lambda upstream: _entrepot_of(upstream, kind))


def address(port: int) -> str:
    """Of a server on this machine."""
    return f"http://{HOST}:{port}"
