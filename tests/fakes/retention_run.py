"""Runs the retention job on a store as the server would, and collects its steps (`RetentionRun`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, cast

from registry.config import RetentionRule
from registry.naming import NamingRules
from registry.upkeep.retention.judgement import RetentionJudge
from registry.upkeep.retention.preview import PreviewLine, PreviewSummary, RetentionPreview
from registry.upkeep.retention.retention_work import KIND, RetentionWork
from storage.jobs import JSON
from storage.names import RepositoryName
from storage.retention import Retention
from storage.store.stored_registry import StoredRegistry
from storage.upkeep.job_runner import run_in_command
from tests.fakes.upkeep_store import Clock

NAMING = NamingRules(["docker.io", "ghcr.io"], default="docker.io")


def rule(repositories: str = "team/**", **conditions: Any) -> RetentionRule:
    return RetentionRule(repositories=repositories.split(","), **conditions)


class RetentionRun:
    """Runs the retention job and collects its steps. Checks that the counted deletions equal those in the job's
    result."""

    def __init__(self, store: StoredRegistry, clock: Clock, *rules: RetentionRule, **options: Any) -> None:
        self.store = store
        self.retention: Retention = options.pop("retention", store.retention)
        self.judge = RetentionJudge(rules, NAMING, store.metadata, self.retention, **options)
        self.deleted: Counter[str] = Counter()
        self.work = RetentionWork(self.judge, self.retention, clock, self._count)
        self.steps: list[Mapping[str, JSON]] = []
        self._clock = clock

    def _count(self, content: str, count: int) -> None:
        self.deleted[content] += count

    async def __call__(self) -> dict[str, Any]:
        jobs, leases = self.store.jobs, self.store.leases
        self.deleted.clear()
        result = cast(
            "dict[str, Any]",
            await run_in_command(jobs, leases, KIND, {}, self.work, actor="test", on_step=self.steps.append),
        )
        assert (self.deleted["tag"], self.deleted["manifest"]) == (result["tags_deleted"], result["manifests_deleted"])
        return result

    async def preview(self, repo: RepositoryName | None = None) -> tuple[dict[str, bool], PreviewSummary]:
        """Returns for each tag or digest whether the job would keep it, and the totals of the preview."""
        lines: list[PreviewLine] = []
        summary = await RetentionPreview(self.judge, self.retention, self._clock).run(lines.append, repo)
        return {entry.tag or entry.digest: entry.is_kept for entry in lines}, summary
