"""Small requests, many at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from bench.errors import TrialFailed
from bench.loaders import head_requests, wrk
from bench.loaders.http_client import MANIFEST_TYPE, HttpClient
from bench.random_content import MANIFEST_ACCEPT, digest_of
from bench.registries.trial_setup import APP_REPO, TAG_COUNT, TAGS_REPO, TrialSetup
from bench.report.measurements import CPU, P50, P99, RATE, Figure, Sample
from bench.system.servers import RunningServer

PUT_TAG_COUNT = 50
"""Tags that take turns in being put."""


@dataclass(frozen=True)
class RequestTarget:
    """What is asked for, and a look at one answer that tells whether it is right."""

    path: str
    right: Callable[[bytes], bool]
    size: int = 0


def request_target(what: str) -> Callable[[TrialSetup], RequestTarget]:
    """By its short name."""

    def find(stage: TrialSetup) -> RequestTarget:
        body = stage.body
        match what:
            case "v2":
                return RequestTarget("/v2/", lambda got: True)
            case "tag":
                return RequestTarget(f"/v2/{APP_REPO}/manifests/latest", lambda got: got == body, len(body))
            case "digest":
                return RequestTarget(f"/v2/{APP_REPO}/manifests/{digest_of(body)}", lambda got: got == body, len(body))
            case "blob":
                small = stage.small
                return RequestTarget(
                    f"/v2/{APP_REPO}/blobs/{small.digest}", lambda got: got == small.content, small.size
                )
            case _:
                names = [f"v{number:03d}" for number in range(TAG_COUNT)]  # docker-registry 2.8 lists them in no order
                return RequestTarget(
                    f"/v2/{TAGS_REPO}/tags/list", lambda got: sorted(json.loads(got)["tags"]) == names, 7 * TAG_COUNT
                )

    return find


def measure_load(server: RunningServer, run: Callable[[], wrk.LoadReport]) -> Sample:
    """A load's figures, with the CPU time the server took for it."""
    before = server.cpu()
    seen = run()
    used = server.cpu() - before
    return {RATE.key: seen.rate, CPU.key: used / seen.requests * 1e6, P50.key: seen.p50, P99.key: seen.p99}


class RequestRow:
    """GETs by wrk."""

    figures: tuple[Figure, ...] = (RATE, CPU, P50, P99)
    rounds: int | None = None

    def __init__(self, name: str, title: str, target: Callable[[TrialSetup], RequestTarget]) -> None:
        self.name, self.title, self._target = name, title, target

    def prepare(self, stage: TrialSetup, server: RunningServer) -> None:
        """The first answers are not measured: they fill caches."""
        target = self._target(stage)
        with HttpClient(server.port) as client:
            answer = client.ask("GET", target.path, headers={"Accept": MANIFEST_ACCEPT}, expect=200)
        if not target.right(answer.body):
            raise TrialFailed(f"{server.name} gave something else for GET {target.path}: {answer.body[:200]!r}")
        self._load(target, server, 1)

    def trial(self, stage: TrialSetup, server: RunningServer, number: int) -> Sample:
        target = self._target(stage)
        return measure_load(server, lambda: self._load(target, server, stage.seconds))

    def _load(self, target: RequestTarget, server: RunningServer, seconds: float) -> wrk.LoadReport:
        return wrk.run_wrk(server.url + target.path, seconds, size=target.size, headers={"Accept": MANIFEST_ACCEPT})


class HeadRow(RequestRow):
    """HEADs, by the loader for those."""

    def _load(self, target: RequestTarget, server: RunningServer, seconds: float) -> wrk.LoadReport:
        return head_requests.run_head_load(server.port, target.path, seconds, wrk.WRK_CONNECTIONS, MANIFEST_ACCEPT)


class TagPutRow:
    """Tags put on one connection; each PUT makes a tag, or moves one."""

    name = "tag-put"
    title = "tag PUT, one connection"
    figures: tuple[Figure, ...] = (RATE, CPU, P50, P99)
    rounds: int | None = None

    def prepare(self, stage: TrialSetup, server: RunningServer) -> None:
        with HttpClient(server.port) as client:
            for file in stage.manifests:
                client.put_manifest(APP_REPO, digest_of(file.read_bytes()), file.read_bytes())

    def trial(self, stage: TrialSetup, server: RunningServer, number: int) -> Sample:
        arguments = [MANIFEST_TYPE, f"r{number}-", str(PUT_TAG_COUNT), *map(str, stage.manifests), APP_REPO]

        def load() -> wrk.LoadReport:
            return wrk.run_wrk(server.url, stage.seconds, connections=1, script="put_tags", arguments=arguments)

        return measure_load(server, load)
