"""Small requests, many at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from bench import heads, wrk
from bench.content import ACCEPT, digest_of
from bench.errors import TrialFailed
from bench.figures import CPU, P50, P99, RATE, Figure, Sample
from bench.rows.row import REPO, TAGGED, TAGS, Stage
from bench.servers import Server
from bench.wire import MANIFEST_TYPE, Client

TURN = 50
"""Tags that take turns in being put."""


@dataclass(frozen=True)
class Target:
    """What is asked for, and a look at one answer that tells whether it is right."""

    path: str
    right: Callable[[bytes], bool]
    size: int = 0


def small_target(what: str) -> Callable[[Stage], Target]:
    """By its short name."""

    def find(stage: Stage) -> Target:
        body = stage.body
        match what:
            case "v2":
                return Target("/v2/", lambda got: True)
            case "tag":
                return Target(f"/v2/{REPO}/manifests/latest", lambda got: got == body, len(body))
            case "digest":
                return Target(f"/v2/{REPO}/manifests/{digest_of(body)}", lambda got: got == body, len(body))
            case "blob":
                small = stage.small
                return Target(f"/v2/{REPO}/blobs/{small.digest}", lambda got: got == small.content, small.size)
            case _:
                names = [f"v{number:03d}" for number in range(TAGS)]  # docker-registry 2.8 lists them in no order
                return Target(f"/v2/{TAGGED}/tags/list", lambda got: sorted(json.loads(got)["tags"]) == names, 7 * TAGS)

    return find


def measured(server: Server, run: Callable[[], wrk.Load]) -> Sample:
    """A load's figures, with the CPU time the server took for it."""
    before = server.cpu()
    seen = run()
    used = server.cpu() - before
    return {RATE.key: seen.rate, CPU.key: used / seen.requests * 1e6, P50.key: seen.p50, P99.key: seen.p99}


class Requests:
    """GETs by wrk."""

    figures: tuple[Figure, ...] = (RATE, CPU, P50, P99)
    rounds: int | None = None

    def __init__(self, name: str, title: str, target: Callable[[Stage], Target]) -> None:
        self.name, self.title, self._target = name, title, target

    def prepare(self, stage: Stage, server: Server) -> None:
        """The first answers are not measured: they fill caches."""
        target = self._target(stage)
        with Client(server.port) as client:
            answer = client.ask("GET", target.path, headers={"Accept": ACCEPT}, expect=200)
        if not target.right(answer.body):
            raise TrialFailed(f"{server.name} gave something else for GET {target.path}: {answer.body[:200]!r}")
        self._load(target, server, 1)

    def trial(self, stage: Stage, server: Server, number: int) -> Sample:
        target = self._target(stage)
        return measured(server, lambda: self._load(target, server, stage.seconds))

    def _load(self, target: Target, server: Server, seconds: float) -> wrk.Load:
        return wrk.load(server.url + target.path, seconds, size=target.size, headers={"Accept": ACCEPT})


class Heads(Requests):
    """HEADs, by the loader for those."""

    def _load(self, target: Target, server: Server, seconds: float) -> wrk.Load:
        return heads.load(server.port, target.path, seconds, wrk.CONNECTIONS, ACCEPT)


class TagPuts:
    """Tags put on one connection; each PUT makes a tag, or moves one."""

    name = "tag-put"
    title = "tag PUT, one connection"
    figures: tuple[Figure, ...] = (RATE, CPU, P50, P99)
    rounds: int | None = None

    def prepare(self, stage: Stage, server: Server) -> None:
        with Client(server.port) as client:
            for file in stage.manifests:
                client.put_manifest(REPO, digest_of(file.read_bytes()), file.read_bytes())

    def trial(self, stage: Stage, server: Server, number: int) -> Sample:
        arguments = [MANIFEST_TYPE, f"r{number}-", str(TURN), *map(str, stage.manifests), REPO]

        def load() -> wrk.Load:
            return wrk.load(server.url, stage.seconds, connections=1, script="put_tags", arguments=arguments)

        return measured(server, load)
