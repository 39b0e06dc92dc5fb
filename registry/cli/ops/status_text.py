"""Formats a server's status for people, as text and tables of the package `rich`. A *fill* is an unfinished download
of a blob from an upstream."""

from __future__ import annotations

import time
from datetime import datetime

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from registry.admin.server_status import EndpointStatus, ServerStatus, UploadStatus, UpstreamStatus
from registry.cli.output import human_size, new_table, plural

_MAX_ROWS = 10
"""Largest number of rows in the table of downloads, and in the table of jobs."""


def format_status(status: ServerStatus, before: ServerStatus | None = None) -> RenderableType:
    """Returns the status as text and tables. The text shows the rate of requests since `before`, an earlier status.
    None: it shows no rate."""
    parts: list[RenderableType] = [_headline(status, before), Text(_disk_line(status))]
    if status.uploads is not None:
        parts.append(Text(_upload_line(status.uploads)))
    problems = filter(None, (status.disk.problem, status.store_problem))
    for problem in dict.fromkeys(problems):  # without duplicates
        parts.append(Text(f"problem: {problem}", "bold red"))
    for table in (
        _worker_table(status),
        _upstream_table(status),
        _cache_table(status),
        _quota_table(status),
        _fill_table(status),
        _job_table(status),
    ):
        if table is not None:
            parts += [Text(), table]
    return Group(*parts)


def _headline(status: ServerStatus, before: ServerStatus | None) -> Text:
    if not status.running:
        return Text("not running", "bold red")
    traffic = status.traffic
    parts = [
        f"entrepot {status.version} runs for {duration_text(status.uptime or 0)}",
        plural(traffic.connections, "connection"),
        f"{plural(traffic.requests, 'request')} in progress",
        f"{traffic.answered} answered",
    ]
    if before is not None and (seconds := (status.now - before.now).total_seconds()) > 0:
        parts.append(f"{max(0, traffic.answered - before.traffic.answered) / seconds:.0f} a second")
    return Text(", ".join(parts), "bold")


def _disk_line(status: ServerStatus) -> str:
    disk = status.disk
    floor = "" if disk.min_free is None else f", pushes stop at {human_size(disk.min_free)} free"
    return f"{disk.path}: {human_size(disk.free)} of {human_size(disk.size)} free{floor}"


def _upload_line(uploads: UploadStatus) -> str:
    if not uploads.open:
        return "no upload is open"
    oldest = "" if uploads.oldest is None else f", the oldest without progress since {_time(uploads.oldest)}"
    return f"{plural(uploads.open, 'upload')} open with {human_size(uploads.size)}{oldest}"


def _worker_table(status: ServerStatus) -> Table | None:
    if not status.workers:
        return None
    table = new_table("worker", "since", "memory", "connections", "requests", "answered", "state")
    for worker in status.workers:
        state = "hangs, or cannot write to the disk" if worker.hangs else "read-only" if worker.read_only else "ok"
        table.add_row(
            str(worker.pid),
            _time(worker.started),
            human_size(worker.memory),
            str(worker.connections) + ("" if worker.max_connections is None else f" of {worker.max_connections}"),
            str(worker.requests),
            str(worker.answered),
            Text(state, "" if state == "ok" else "red"),
        )
    return table


def _upstream_table(status: ServerStatus) -> Table | None:
    if not status.upstreams:
        return None
    table = new_table("upstream", "endpoint", "state", "requests left", "last error")
    for upstream in status.upstreams:
        for endpoint in upstream.endpoints:
            state, is_bad = _endpoint_state(endpoint)
            table.add_row(
                *map(Text, (upstream.name, endpoint.url)),
                Text(state, "red" if is_bad else ""),
                _requests_left(upstream),
                Text(_last_error(endpoint)),
            )
    return table


def _endpoint_state(endpoint: EndpointStatus) -> tuple[str, bool]:
    """Returns the state of an endpoint in words, and whether the endpoint has failed.

    - `endpoint.retry_in`: seconds until the endpoint is tried again.
    - `endpoint.failing_in`: the number of workers (not a time) whose last requests to the endpoint failed."""
    if endpoint.breaker == "open":
        wait = "" if endpoint.retry_in is None else f", tried again in {endpoint.retry_in:.0f} s"
        return f"left alone after failures{wait}", True
    if endpoint.breaker == "half-open":
        return "failed; the next request tries it", True
    if endpoint.failing_in:
        return f"last requests failed in {plural(endpoint.failing_in, 'worker')}", True
    return ("ok" if endpoint.breaker == "closed" else "not known"), False


def _last_error(endpoint: EndpointStatus) -> str:
    if endpoint.last_error is None:
        return "-"
    at = "" if endpoint.last_error_at is None else f"{_time(endpoint.last_error_at)} "
    return f"{at}{endpoint.last_error}"


def _requests_left(upstream: UpstreamStatus) -> str:
    """Returns a text that says how many requests the upstream's rate limit still allows."""
    if upstream.paused_until is not None:
        return f"none until {_time(upstream.paused_until)}"
    if upstream.remaining is None:
        return "-"
    return str(upstream.remaining) + ("" if upstream.limit is None else f" of {upstream.limit}")


def _cache_table(status: ServerStatus) -> Table | None:
    if not status.cache:
        return None
    table = new_table("cache", "size", "budget", "images", "blobs")
    for part in status.cache:
        budget = "-" if part.max_size is None else human_size(part.max_size)
        size = human_size(part.size) if part.complete else f"{human_size(part.size)} (still counting)"
        table.add_row(*map(Text, (part.upstream or "all", size, budget, str(part.images), str(part.blobs))))
    return table


def _quota_table(status: ServerStatus) -> Table | None:
    if not status.quotas:
        return None
    table = new_table("quota", "size", "limit", "tags", "tag limit")
    for quota in status.quotas:
        limit = "-" if quota.max_size is None else human_size(quota.max_size)
        tags = "-" if quota.max_tags is None else str(quota.max_tags)
        table.add_row(*map(Text, (quota.prefix or "all", human_size(quota.size), limit, str(quota.tags), tags)))
    return table


def _fill_table(status: ServerStatus) -> Table | None:
    """Returns the table of the fills, the running ones first; None if there are no fills."""
    fills = sorted(status.fills, key=lambda fill: not fill.running)
    if not fills:
        return None
    table = new_table("download", "size", "done", "state")
    for fill in fills[:_MAX_ROWS]:
        done = f"{100 * fill.received // fill.size if fill.size else 100} %"
        state = "running" if fill.running else "continues when the blob is requested again"
        table.add_row(*map(Text, (fill.digest, human_size(fill.size), done, state)))
    if len(fills) > _MAX_ROWS:
        table.add_row(f"and {len(fills) - _MAX_ROWS} more", "", "", "")
    return table


def _job_table(status: ServerStatus) -> Table | None:
    if not status.jobs:
        return None
    table = new_table("job", "kind", "state", "progress", "message")
    for job in status.jobs[:_MAX_ROWS]:
        progress = f"{job.done}{'' if job.total is None else f' of {job.total}'} {job.unit}".strip()
        table.add_row(*map(Text, (str(job.id), job.kind, job.state, progress, job.message)))
    return table


def duration_text(seconds: float) -> str:
    """Returns a duration as text, such as `3 d 4 h` or `12 s`. The text has at most two units, and leaves out zeros."""
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    remaining, parts = int(seconds), []
    for name, size in units:
        if remaining >= size:
            parts.append(f"{remaining // size} {name}")
            remaining %= size
    return " ".join(parts[:2]) or "0 s"


def _time(moment: datetime) -> str:
    """Returns the text of a moment in local time, with the date if it is not today."""
    local = time.localtime(moment.timestamp())
    is_today = local[:3] == time.localtime()[:3]
    return time.strftime("%H:%M:%S" if is_today else "%Y-%m-%d %H:%M", local)
