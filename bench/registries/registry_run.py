"""The bench `registries`: compares Entrepot with docker-registry, or with an older Entrepot. Both servers run during
the whole bench, and are measured one after the other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from bench.random_content import MIB
from bench.registries.fresh_server_rows import BEARER_ROW, LOGIN_STORM_ROW, START_ROW
from bench.registries.registry_trial import RegistryContent, RegistryTrial
from bench.registries.request_rows import (
    TAG_PUT_ROW,
    api_base,
    latest_manifest,
    load_heads,
    manifest_by_digest,
    request_row,
    small_blob,
    tags_list,
)
from bench.registries.transfer_rows import transfer_rows
from bench.report.goals import PEAK_MEMORY_ROW, REGISTRY_GOALS
from bench.report.measurements import PSS, RowSamples
from bench.runner import Bench, Options, Rounds, Row, comparison, pick_rows
from bench.system.machine import DOCKER_PACKAGES, LOADER_PACKAGES
from bench.system.servers import RunningServer, ServerProgram, sampled_memory, started_server

BASE_DISK_BYTES = 12 << 30
"""Bytes of disk for docker and for the content that is pushed before the first round."""
ROUND_DISK_BYTES = 1 << 30
"""Bytes of disk for the content and the logs of one round."""
MEMORY_INTERVAL_SECONDS = 1.0


def all_rows() -> list[Row[RegistryTrial]]:
    """Returns every row, in the order in which they are measured and printed."""
    return [
        START_ROW,
        request_row("v2", "GET /v2/", api_base),
        request_row("manifest-tag", "manifest by tag", latest_manifest),
        BEARER_ROW,
        request_row("manifest-digest", "manifest by digest", manifest_by_digest),
        request_row("head-tag", "HEAD manifest by tag", latest_manifest, load_heads),
        request_row("head-digest", "HEAD manifest by digest", manifest_by_digest, load_heads),
        request_row("blob-4k", "blob of 4 KiB", small_blob),
        request_row("head-blob", "HEAD blob of 4 KiB", small_blob, load_heads),
        request_row("tags-list", "tags list, 300 tags", tags_list),
        TAG_PUT_ROW,
        *transfer_rows(),
        LOGIN_STORM_ROW,
    ]


def registry_bench(options: Options) -> Bench:
    """Returns the bench, ready to run. Raises BenchFailed if the options name an unknown row, or a folder that is not a
    checkout of Entrepot."""
    rows = pick_rows(all_rows(), options.only)
    packages = LOADER_PACKAGES | (DOCKER_PACKAGES if any(row.name == "docker-pull" for row in rows) else {})
    disk_bytes = BASE_DISK_BYTES + options.rounds * ROUND_DISK_BYTES
    measure = partial(_measure, rows, options)
    return comparison(options, ("latest", "against"), packages, disk_bytes, REGISTRY_GOALS, measure)


def _measure(
    rows: Sequence[Row[RegistryTrial]], options: Options, programs: Sequence[ServerProgram], folder: Path
) -> list[RowSamples]:
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(started_server(program, folder / program.name)) for program in programs]
        peaks = dict[str, int]()
        content = RegistryContent(folder, stack)
        for server in servers:
            content.fill(server)

        @contextlib.contextmanager
        def open_trial(server: RunningServer, number: int) -> Iterator[RegistryTrial]:
            with sampled_memory(server, MEMORY_INTERVAL_SECONDS, peaks):
                yield RegistryTrial(content, server, options.seconds, number)

        rounds = Rounds(rows, servers, open_trial)
        rounds.prepare()
        peaks.clear()  # the memory during the preparation does not count
        measured_rows = rounds.run(options.rounds)
    peak = RowSamples(PEAK_MEMORY_ROW, "memory at its peak", (PSS,))
    peak.samples = {name: [{PSS.key: size / MIB}] for name, size in peaks.items()}
    return [*measured_rows, peak]
