"""The rows of the table: each knows how to make one trial against one server."""

from __future__ import annotations

from bench.rows.bearer_row import Bearer
from bench.rows.bulk_rows import BulkPull, BulkPush, UnderBulk
from bench.rows.pull_row import DockerPull
from bench.rows.row import Row, Stage
from bench.rows.small_rows import Heads, Requests, TagPuts, small_target
from bench.rows.start_row import Start
from bench.rows.storm_row import Storm

__all__ = ["Row", "Stage", "all_rows"]


def all_rows() -> list[Row]:
    """Every row, in the order in which they are measured and printed."""
    return [
        Start(),
        Requests("v2", "GET /v2/", small_target("v2")),
        Requests("manifest-tag", "manifest by tag", small_target("tag")),
        Bearer(),
        Requests("manifest-digest", "manifest by digest", small_target("digest")),
        Heads("head-tag", "HEAD manifest by tag", small_target("tag")),
        Heads("head-digest", "HEAD manifest by digest", small_target("digest")),
        Requests("blob-4k", "blob of 4 KiB", small_target("blob")),
        Heads("head-blob", "HEAD blob of 4 KiB", small_target("blob")),
        Requests("tags-list", "tags list, 300 tags", small_target("tags")),
        TagPuts(),
        BulkPull("blob-256m", "blob of 256 MiB", 1),
        BulkPull("blob-256m-x4", "blob of 256 MiB, 4 at once", 4),
        UnderBulk(),
        BulkPush(),  # what it leaves of the memory it touches must not go back to the host while latencies are measured
        DockerPull(),
        Storm(),
    ]
