"""`WorkMetrics` has the metrics of calls on the registry, logins, the database and upkeep. `EventMetrics` has the
metrics of webhooks. A *call* on the registry runs a method of `storage.interface.Registry`. A metric counts in *cells*:
numbers in memory that all processes share (`registry.telemetry.metric_families`). Each process adds only to its own
cells (`SharedCells.own`). When the metrics are read, the cells of all processes are added up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

from registry.telemetry.metric_families import CellPlan, Counter, Histogram, Labels
from registry.telemetry.shared_cells import SharedCells, SharedNames
from storage.cached_images import EvictedImage
from storage.jobs import JobState
from storage.upkeep.collection_report import Removal, RemovalKind

OPERATIONS: Final = (
    *("resolve_blob", "open_blob", "resolve_manifest", "get_manifest", "start_upload", "resume_upload"),
    *("upload_offset", "mount_blob", "put_manifest", "delete_blob", "delete_manifest", "delete_tag"),
    *("repositories", "tags", "referrers", "other"),
)
"""The values of the label `operation` of calls: the names of methods of `storage.interface.Registry`. The value `other`
stands for the remaining methods."""
JOB_KINDS: Final = (
    "gc",
    "fsck",
    "scrub",
    "backup",
    "import-registry",
    "import-remote",
    "evict",
    "retention",
    "warm",
    "other",
)
"""The values of the label `kind` of jobs."""
RETENTION_CONTENT: Final = ("tag", "manifest")
"""The values of the label `content`: what retention deletes."""
LOGIN_METHODS: Final = ("password", "token", "issuer", "openid", "other")
"""The values of the label `method` of logins."""
CALL_SECONDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
"""Upper bounds of the buckets for the durations of calls, in seconds."""
COMMIT_SECONDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0)
"""Upper bounds of the buckets for the durations of commits, and of the waits before them, in seconds."""
WEBHOOK_CAPACITY: Final = 64
"""Largest number of webhooks that have separate metrics. A removed webhook keeps its metrics until the server
restarts."""


class WorkMetrics:
    """The metrics of calls on the registry, logins, the database and upkeep, with methods that count. The methods
    return immediately and raise nothing."""

    def __init__(self, plan: CellPlan) -> None:
        """`plan`: gives each metric its cells. Call `attach_memory` before anything is counted."""
        self._cells: SharedCells
        self.calls = Histogram(
            plan,
            "entrepot_registry_call_duration_seconds",
            "Time of calls on the registry. A request that the response cache answers makes no call.",
            {"operation": OPERATIONS},
            bounds=CALL_SECONDS,
        )
        self._call_cells = {operation: self.calls.cell(operation) for operation in OPERATIONS}
        self.logins = Counter(
            plan,
            "entrepot_logins_total",
            "Checks of credentials. A process may skip the check of a credential that it has found valid before.",
            {"method": LOGIN_METHODS, "outcome": ("ok", "failed", "throttled")},
        )
        self.denials = Counter(
            plan,
            "entrepot_denials_total",
            "Calls on the registry that an account had no right to.",
            {"action": ("pull", "push", "delete", "admin", "other")},
        )
        self.changes = Counter(plan, "entrepot_database_changes_total", "Changes of the metadata.")
        self.commit_seconds = Histogram(
            plan,
            "entrepot_database_commit_duration_seconds",
            "Time of a transaction with a batch of changes, including the sync of the disk.",
            bounds=COMMIT_SECONDS,
        )
        self.lock_wait_seconds = Histogram(
            plan,
            "entrepot_database_lock_wait_seconds",
            "Time that a batch of changes waited for another process.",
            bounds=COMMIT_SECONDS,
        )
        kinds = list(RemovalKind)
        self.removed_items = Counter(
            plan, "entrepot_collected_items_total", "What garbage collection removed.", {"kind": kinds}
        )
        self.freed_bytes = Counter(
            plan, "entrepot_collected_bytes_total", "Bytes that garbage collection freed.", {"kind": kinds}
        )
        self.evicted_images = Counter(plan, "entrepot_evicted_images_total", "Images evicted from the cache.")
        self.evicted_bytes = Counter(plan, "entrepot_evicted_bytes_total", "Bytes of evicted images.")
        self.scrubbed_bytes = Counter(
            plan, "entrepot_scrubbed_bytes_total", "Bytes of stored content that scrub has read and hashed."
        )
        self.retention_deletions = Counter(
            plan,
            "entrepot_retention_deletions_total",
            "Tags and manifests that the rules of retention have deleted.",
            {"content": RETENTION_CONTENT},
        )
        self.jobs = Counter(
            plan,
            "entrepot_jobs_total",
            "Jobs that have ended in a server process.",
            {"kind": JOB_KINDS, "outcome": (JobState.DONE, JobState.STOPPED, JobState.FAILED)},
        )

    def attach_memory(self, cells: SharedCells) -> None:
        """Makes the methods count in `cells`: the memory with the cells of all metrics of the plan."""
        self._cells = cells

    def on_call(self, operation: str, seconds: float) -> None:
        """Counts a call on the registry."""
        self.calls.observe(self._cells.own, self._call_cells.get(operation) or self.calls.cell(operation), seconds)

    def on_login(self, method: str, outcome: str) -> None:
        """Counts a login (`registry.auth.audit_log.OnLogin`)."""
        self._cells.own[self.logins.cell(method, outcome)] += 1

    def on_denied(self, actions: Sequence[str]) -> None:
        """Counts a denied call, once for each of the `actions` that it needed."""
        for action in actions:
            self._cells.own[self.denials.cell(action)] += 1

    def on_commit(self, change_count: int, wait_seconds: float, commit_seconds: float) -> None:
        """Counts a batch of `change_count` changes. Only the commit thread may call this method, so that no other
        thread writes to the cells of these metrics."""
        cells = self._cells.own
        cells[self.changes.first_cell] += change_count
        self.lock_wait_seconds.observe(cells, self.lock_wait_seconds.first_cell, wait_seconds)
        self.commit_seconds.observe(cells, self.commit_seconds.first_cell, commit_seconds)

    def on_removed(self, removal: Removal) -> None:
        """Counts an item that garbage collection removed."""
        self._cells.own[self.removed_items.cell(removal.kind)] += 1
        self._cells.own[self.freed_bytes.cell(removal.kind)] += removal.size

    def on_eviction_end(self, images: Sequence[EvictedImage]) -> None:
        """Counts evicted images."""
        self._cells.own[self.evicted_images.first_cell] += len(images)
        self._cells.own[self.evicted_bytes.first_cell] += sum(image.bytes for image in images)

    def on_scrubbed(self, byte_count: int) -> None:
        """Counts bytes that scrub has read."""
        self._cells.own[self.scrubbed_bytes.first_cell] += byte_count

    def on_retention(self, content: Literal["tag", "manifest"], count: int) -> None:
        """Counts tags or manifests that retention has deleted."""
        self._cells.own[self.retention_deletions.cell(content)] += count

    def on_job_ended(self, kind: str, outcome: JobState) -> None:
        """Counts a job that this process has run."""
        self._cells.own[self.jobs.cell(kind, outcome)] += 1


class EventMetrics:
    """The metrics of webhooks, with methods that count. Implements `registry.events.attempts.DeliveryObserver`. The
    methods return immediately and raise nothing."""

    def __init__(self, plan: CellPlan) -> None:
        """`plan`: gives each metric its cells. Call `attach_memory` before anything is counted."""
        self._cells: SharedCells
        self._webhook_names: SharedNames
        by_webhook: Labels = {"webhook": SharedNames.all_label_values(WEBHOOK_CAPACITY)}
        self.sent = Counter(plan, "entrepot_events_sent_total", "Events that webhooks have accepted.", by_webhook)
        self.failed_attempts = Counter(
            plan,
            "entrepot_events_failed_attempts_total",
            "Failed attempts to tell a webhook of an event.",
            {**by_webhook, "outcome": ("refused", "down")},
        )
        self.dead_letters = Counter(
            plan, "entrepot_events_given_up_total", "Events that have become dead letters.", by_webhook
        )
        self.dropped_events = Counter(
            plan,
            "entrepot_events_dropped_total",
            "Events that were dropped, because too many were pending or dead.",
            {**by_webhook, "state": ("pending", "dead")},
        )
        self.unrecorded_pulls = Counter(
            plan,
            "entrepot_events_unrecorded_pulls_total",
            "Pulls without an event, because too many pulls were waiting to be stored.",
        )

    def attach_memory(self, cells: SharedCells, webhooks: SharedNames) -> None:
        """Makes the methods count in `cells`: the memory with the cells of all metrics of the plan. `webhooks` gives
        each webhook a number, and the label `webhook` has this number as its value. When the metrics are read,
        `Metrics.label_values` replaces the number by the webhook's name."""
        self._cells = cells
        self._webhook_names = webhooks

    def on_attempt(self, webhook: str, outcome: str) -> None:
        """Counts an attempt to tell a webhook of an event. `outcome`: how the attempt ended
        (`registry.events.attempts.DeliveryOutcome`)."""
        label = self._webhook_names.label_value(webhook)
        is_sent = outcome == "delivered"
        self._cells.own[self.sent.cell(label) if is_sent else self.failed_attempts.cell(label, outcome)] += 1

    def on_given_up(self, webhook: str) -> None:
        """Counts an event that has become a *dead letter*: an event that is not sent to the webhook any more."""
        self._cells.own[self.dead_letters.cell(self._webhook_names.label_value(webhook))] += 1

    def on_dropped(self, webhook: str, pending: int, dead: int) -> None:
        """Counts dropped events. `pending`: how many of them waited for their delivery. `dead`: how many were dead
        letters."""
        label = self._webhook_names.label_value(webhook)
        self._cells.own[self.dropped_events.cell(label, "pending")] += pending
        self._cells.own[self.dropped_events.cell(label, "dead")] += dead

    def on_unrecorded_pulls(self, count: int) -> None:
        """Counts pulls for which no event was stored."""
        self._cells.own[self.unrecorded_pulls.first_cell] += count
