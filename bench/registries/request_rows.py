"""Rows of the table of the bench `registries` for small requests, which are sent in parallel."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial

from bench.errors import TrialFailed
from bench.loaders.head_requests import run_head_load
from bench.loaders.http_client import MANIFEST_ACCEPT, MANIFEST_TYPE, HttpClient
from bench.loaders.load_report import LoadReport, measure_load
from bench.loaders.wrk import DEFAULT_HEADERS, WRK_CONNECTIONS, run_wrk
from bench.random_content import digest_of
from bench.registries.registry_trial import APP_REPO, TAG_COUNT, TAGS_REPO, RegistryContent, RegistryTrial
from bench.report.measurements import CPU, P50, P99, RATE, Sample
from bench.runner import Row

REQUEST_FIGURES = (RATE, CPU, P50, P99)
WARM_UP_SECONDS = 1.0
PUT_TAG_COUNT = 50
"""Number of tags that the PUTs create and then move, one after the other."""
Target = Callable[[RegistryContent], tuple[str, bytes]]
"""Returns the path of a resource and the body of its response; an empty body is not checked."""


def latest_manifest(content: RegistryContent) -> tuple[str, bytes]:
    return f"/v2/{APP_REPO}/manifests/latest", content.bodies[0]


def manifest_by_digest(content: RegistryContent) -> tuple[str, bytes]:
    return f"/v2/{APP_REPO}/manifests/{digest_of(content.bodies[0])}", content.bodies[0]


def small_blob(content: RegistryContent) -> tuple[str, bytes]:
    assert isinstance(content.small.content, bytes)
    return f"/v2/{APP_REPO}/blobs/{content.small.digest}", content.small.content


def api_base(_content: RegistryContent) -> tuple[str, bytes]:
    return "/v2/", b""


def tags_list(_content: RegistryContent) -> tuple[str, bytes]:
    tags = [f"v{number:03d}" for number in range(TAG_COUNT)]
    return f"/v2/{TAGS_REPO}/tags/list", json.dumps({"name": TAGS_REPO, "tags": tags}, separators=(",", ":")).encode()


def load_target(
    trial: RegistryTrial, target: Target, seconds: float, headers: Mapping[str, str] = DEFAULT_HEADERS
) -> LoadReport:
    """Gets the target with wrk for `seconds`."""
    path, body = target(trial.content)
    return run_wrk(trial.server.url + path, seconds, size=len(body), headers=headers)


def load_heads(trial: RegistryTrial, target: Target, seconds: float) -> LoadReport:
    """Sends HEAD requests for the target for `seconds`."""
    return run_head_load(trial.server.port, target(trial.content)[0], seconds, WRK_CONNECTIONS)


Load = Callable[[RegistryTrial, Target, float], LoadReport]


def _check_and_warm_up(trial: RegistryTrial, *, target: Target, load: Load) -> None:
    """Checks one response. Then sends requests that are not measured but fill the server's caches."""
    path, body = target(trial.content)
    with HttpClient(trial.server.port) as client:
        received = client.request("GET", path, headers={"Accept": MANIFEST_ACCEPT}, expect=200).body
    if target is tags_list:  # docker-registry 2.8 lists tags in no order
        received, body = (json.dumps(sorted(json.loads(text)["tags"])).encode() for text in (received, body))
    if body and received != body:
        raise TrialFailed(f"{trial.server.name} gave something else for GET {path}: {received[:200]!r}")
    load(trial, target, WARM_UP_SECONDS)


def _measure_target(trial: RegistryTrial, *, target: Target, load: Load) -> Sample:
    return measure_load(trial.server, lambda: load(trial, target, trial.seconds))


def request_row(name: str, title: str, target: Target, load: Load = load_target) -> Row[RegistryTrial]:
    """Returns a row that requests one target again and again."""
    prepare = partial(_check_and_warm_up, target=target, load=load)
    return Row(name, title, REQUEST_FIGURES, partial(_measure_target, target=target, load=load), prepare)


def _push_moving_manifests(trial: RegistryTrial) -> None:
    with HttpClient(trial.server.port) as client:
        for body in trial.content.bodies:
            client.put_manifest(APP_REPO, digest_of(body), body)


def _put_tags(trial: RegistryTrial) -> Sample:
    files = map(str, trial.content.manifest_files)
    arguments = [MANIFEST_TYPE, f"r{trial.round}-", str(PUT_TAG_COUNT), *files, APP_REPO]
    run = partial(run_wrk, connections=1, script="put_tags", arguments=arguments)
    return measure_load(trial.server, lambda: run(trial.server.url, trial.seconds))


TAG_PUT_ROW = Row("tag-put", "tag PUT, one connection", REQUEST_FIGURES, _put_tags, _push_moving_manifests)
"""Each PUT creates a tag or moves one."""
