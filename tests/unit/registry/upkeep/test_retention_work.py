"""The job `retention` over a real store: what it deletes and keeps, and how it continues after a restart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, cast

import pytest

from registry.config import RetentionRule
from registry.naming import NamingRules
from registry.upkeep.retention import preview
from registry.upkeep.retention.judgement import RetentionJudge
from registry.upkeep.retention.preview import PreviewLine, PreviewSummary, RetentionPreview
from registry.upkeep.retention.retention_work import ACTOR, KIND, RetentionWork
from storage.access import AuditQuery
from storage.content import Manifest
from storage.errors import ManifestUnknown, NameUnknown
from storage.jobs import JSON, Job, JobState, JobStopped
from storage.names import RepositoryName, Tag
from storage.patterns import NamePattern
from storage.retention import Retention, TagFacts, UnusedLimits
from storage.store.stored_registry import StoredRegistry
from storage.tag_rules import ImmutableTags, TagPattern, TagRule
from storage.upkeep.job_runner import JobContext, run_in_command, run_job
from storage.upkeep.tag_changes import TagChanges
from tests.fakes.registry_content import BY, all_tags, index_of, push_image
from tests.fakes.upkeep_store import APP, DAY, Clock, pull

OTHER = RepositoryName("team/other")
MIRRORED = RepositoryName("docker.io/library/ubuntu")
NAMING = NamingRules(["docker.io", "ghcr.io"], default="docker.io")


def rule(repositories: str = "team/**", **conditions: Any) -> RetentionRule:
    return RetentionRule(repositories=repositories.split(","), **conditions)


class Run:
    """Runs the job and keeps its steps. Checks that the counted deletions are those of the result."""

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
        """Returns for each tag or digest whether it would be kept, and the totals."""
        lines: list[PreviewLine] = []
        summary = await RetentionPreview(self.judge, self.retention, self._clock).run(lines.append, repo)
        return {line.tag or line.digest: line.is_kept for line in lines}, summary


class Interrupted:
    """A `Retention` that calls a function before each deletion of a tag."""

    def __init__(self, inner: Retention, before: Callable[[TagFacts], Awaitable[None]]) -> None:
        self._inner = inner
        self._before = before

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def delete_tag(self, repo: RepositoryName, judged: TagFacts, *arguments: Any) -> bool:
        await self._before(judged)
        return await self._inner.delete_tag(repo, judged, *arguments)


async def push_daily(store: StoredRegistry, clock: Clock, repo: RepositoryName, *tags: str) -> list[Manifest]:
    """Pushes one image a day with these tags."""
    images = []
    for tag in tags:
        images.append(await push_image(store, repo, f"{repo} {tag}", tag))
        clock.pass_days(1)
    return images


async def has(store: StoredRegistry, repo: RepositoryName, manifest: Manifest) -> bool:
    try:
        await store.resolve_manifest(repo, manifest.digest)
    except ManifestUnknown:
        return False
    return True


async def test_tags_that_no_condition_keeps_are_deleted(store: StoredRegistry, clock: Clock) -> None:
    """Tags that no condition keeps are deleted. Their manifests stay, the audit log names the actor, and other
    repositories do not change."""
    images = await push_daily(store, clock, APP, "v1", "a", "b", "c", "d")
    await push_daily(store, clock, RepositoryName("private/app"), "a", "b")
    await pull(store, APP, images[1].digest, clock)
    run = Run(store, clock, rule(keep_last=2, keep_tags=["v*"], keep_pulled_within="1d"))

    result = await run()

    assert await all_tags(store, APP) == ["a", "c", "d", "v1"]
    assert await all_tags(store, RepositoryName("private/app")) == ["a", "b"]
    assert await has(store, APP, images[2])
    counts = {"repositories": 1, "tags_kept": 4, "tags_deleted": 1, "manifests_deleted": 0}
    assert result == {**counts, "warnings": []}
    [step] = run.steps
    assert (step["action"], step["repository"], step["tag"], step["rule"]) == ("delete", APP, "b", 1)
    [line] = store.accounts.audit(AuditQuery(actor=ACTOR.name), 10).items
    assert (line.action, line.target) == ("tag.delete", f"{APP}:b")


async def test_the_first_rule_that_matches_applies(store: StoredRegistry, clock: Clock) -> None:
    await push_daily(store, clock, APP, "a", "b", "c")
    await push_daily(store, clock, OTHER, "a", "b", "c")
    await Run(store, clock, rule("team/app", keep_last=2), rule("**", keep_last=1))()
    assert await all_tags(store, APP) == ["b", "c"]
    assert await all_tags(store, OTHER) == ["c"]


async def test_mirrored_repositories_are_left_alone(store: StoredRegistry, clock: Clock) -> None:
    """Tags of mirrored repositories are kept, whatever pattern the rule has, because they follow the upstream."""
    await push_daily(store, clock, MIRRORED, "a", "b")
    result = await Run(store, clock, rule("**", keep_last=1))()
    assert await all_tags(store, MIRRORED) == ["a", "b"]
    assert result["repositories"] == 0


async def test_a_multi_platform_image_stays_whole(store: StoredRegistry, clock: Clock) -> None:
    """A pull of one platform keeps the index with all its children and referrers."""
    children = [await push_image(store, APP, platform) for platform in ("amd64", "arm64")]
    index = index_of([child.descriptor for child in children])
    await store.put_manifest(APP, index, [Tag("1")], by=BY)
    signature = await push_image(store, APP, "signature", subject=children[1].digest)
    clock.pass_days(30)
    await pull(store, APP, children[0].digest, clock)
    kept = rule(keep_pulled_within="14d", delete_untagged_after="0s")

    await Run(store, clock, kept)()
    assert [await has(store, APP, manifest) for manifest in (index, *children, signature)] == [True] * 4

    clock.pass_days(15)
    result = await Run(store, clock, kept)()
    assert [await has(store, APP, manifest) for manifest in (index, *children, signature)] == [False] * 4
    assert (result["tags_deleted"], result["manifests_deleted"]) == (1, 4)
    assert await store.metadata.queued_links(clock() + 1, 100)  # garbage collection frees the space


async def test_a_manifest_stays_for_a_while_after_its_tag(store: StoredRegistry, clock: Clock) -> None:
    """`delete_untagged_after` counts from the deletion of the tag, so that the tag can be restored meanwhile."""
    old, _ = await push_daily(store, clock, APP, "old", "new")
    clock.pass_days(100)
    run = Run(store, clock, rule(keep_last=1, delete_untagged_after="7d"))
    assert (await run())["manifests_deleted"] == 0
    clock.pass_days(6)
    assert (await run())["manifests_deleted"] == 0
    assert await has(store, APP, old)
    clock.pass_days(2)
    assert (await run())["manifests_deleted"] == 1
    assert not await has(store, APP, old)


async def test_untagged_manifests_stay_by_default(store: StoredRegistry, clock: Clock) -> None:
    """Without `delete_untagged_after`, untagged manifests are kept, because deployments may name them by digest."""
    image = await push_image(store, APP, "untagged")
    clock.pass_days(1000)
    await Run(store, clock, rule(keep_last=1))()
    assert await has(store, APP, image)


async def test_a_push_between_judgement_and_deletion_wins(store: StoredRegistry, clock: Clock) -> None:
    await push_daily(store, clock, APP, "a", "b", "c")

    async def push(judged: TagFacts) -> None:
        if judged.name == "a":
            await push_image(store, APP, "a, again", "a")

    run = Run(store, clock, rule(keep_last=1), retention=Interrupted(store.retention, push))
    result = await run()
    assert await all_tags(store, APP) == ["a", "c"]
    assert [(step["tag"], step["action"]) for step in run.steps] == [("a", "keep"), ("b", "delete")]
    assert (result["tags_kept"], result["tags_deleted"]) == (2, 1)


async def test_what_an_immutable_tag_needs_stays(store: StoredRegistry, clock: Clock) -> None:
    """The manifest of an immutable tag is kept, with the manifests below it and their referrers. The preview gives this
    reason."""
    child = await push_image(store, APP, "child")
    index = index_of([child.descriptor])
    await store.put_manifest(APP, index, [Tag("v1"), Tag("other")], by=BY)
    signature = await push_image(store, APP, "signature", subject=child.digest)
    gone = await push_image(store, APP, "gone", "a")
    clock.pass_days(100)
    everything = rule(delete_all=True, delete_untagged_after="0s")
    immutable_tags = ImmutableTags([TagRule((NamePattern("team/app"),), (TagPattern("v*"),))])
    run = Run(store, clock, everything, immutable_tags=immutable_tags)

    lines: list[PreviewLine] = []
    await RetentionPreview(run.judge, store.retention, clock).run(lines.append)
    assert {line.tag: line.reason for line in lines if line.is_kept} == {"v1": "it is immutable"}
    result = await run()
    assert await all_tags(store, APP) == ["v1"]
    assert [await has(store, APP, each) for each in (index, child, signature, gone)] == [True, True, True, False]
    assert (result["tags_kept"], result["tags_deleted"], result["manifests_deleted"]) == (1, 2, 1)


async def test_what_retention_deletes_can_be_put_back(store: StoredRegistry, clock: Clock) -> None:
    """During the grace period, a deleted multi-platform image can be put back completely, with its signatures."""
    children = [await push_image(store, APP, platform) for platform in ("amd64", "arm64")]
    index = index_of([child.descriptor for child in children])
    await store.put_manifest(APP, index, [Tag("1")], by=BY)
    signature = await push_image(store, APP, "signature", subject=children[1].digest)
    image = [index, *children, signature]
    clock.pass_days(100)
    everything = Run(store, clock, rule(delete_all=True, delete_untagged_after="0s"))
    assert (await everything())["manifests_deleted"] == 4
    clock.now += DAY / 2
    await store.collector.collect()
    changes = TagChanges(store.tag_history, store.immutable_tags)
    await changes.restore(APP, Tag("1"), by=BY)
    assert [await has(store, APP, manifest) for manifest in image] == [True] * 4
    for manifest in image:
        for blob in manifest.blobs:
            await store.resolve_blob(APP, blob.digest)

    clock.pass_days(1)
    await everything()
    clock.now += DAY + 1
    await store.collector.collect()
    with pytest.raises(ManifestUnknown):
        await changes.restore(APP, Tag("1"), by=BY)


async def test_a_job_goes_on_where_it_was_stopped(
    store: StoredRegistry, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a restart, the job skips the repositories that it has finished. Its result counts them."""
    monkeypatch.setattr("storage.upkeep.job_runner.SAVE_SECONDS", 0.0)
    names = [RepositoryName(f"team/{name}") for name in ("a", "b", "c")]
    for name in names:
        await push_daily(store, clock, name, "old", "new")
    job = await store.jobs.add(KIND, {}, actor="test", is_resumable=True)

    async def stop_in_b(judged: TagFacts) -> None:
        if await all_tags(store, names[0]) == ["new"]:
            raise JobStopped

    interrupted = Run(store, clock, rule(keep_last=1), retention=Interrupted(store.retention, stop_in_b))
    with pytest.raises(JobStopped):
        await interrupted.work(JobContext(job, store.jobs))
    stopped: Job = await store.jobs.job(job.id)
    assert await all_tags(store, names[1]) == ["new", "old"]

    for tag in ("later", "latest"):  # the job has done this repository
        await push_image(store, names[0], tag, tag)
    result = await run_job(JobContext(stopped, store.jobs), store.jobs, Run(store, clock, rule(keep_last=1)).work)
    assert [len(await all_tags(store, name)) for name in names] == [3, 1, 1]
    assert (result["repositories"], result["tags_deleted"]) == (3, 3)
    assert (await store.jobs.job(job.id)).state is JobState.DONE


async def test_a_killed_deletion_of_an_index_is_completed(store: StoredRegistry, clock: Clock) -> None:
    """If the process is killed after the index was deleted, the next run deletes the manifests that belonged to it."""
    children = [await push_image(store, APP, platform) for platform in ("amd64", "arm64")]
    index = index_of([child.descriptor for child in children])
    await store.put_manifest(APP, index, by=BY)
    clock.pass_days(2)
    await store.retention.delete_untagged(APP, index.digest, UnusedLimits(clock(), clock(), clock()), clock(), ACTOR)
    result = await Run(store, clock, rule(keep_last=1, delete_untagged_after="1d"))()
    assert result["manifests_deleted"] == 2


async def test_a_large_untagged_index_goes_in_steps(store: StoredRegistry, clock: Clock) -> None:
    """One transaction deletes only a limited number of the children of an index."""
    children = [await push_image(store, APP, str(number)) for number in range(25)]
    await store.put_manifest(APP, index_of([child.descriptor for child in children]), by=BY)
    clock.pass_days(2)
    result = await Run(store, clock, rule(keep_last=1, delete_untagged_after="1d"))()
    assert result["manifests_deleted"] == 26


async def test_a_preview_says_what_a_run_does(store: StoredRegistry, clock: Clock) -> None:
    """A preview predicts what a run deletes, deletes nothing itself, and counts shared blobs once."""
    old, new = await push_daily(store, clock, APP, "old", "new")
    await push_image(store, OTHER, f"{APP} old", "old")
    await push_image(store, OTHER, f"{APP} new", "new")
    clock.pass_days(100)
    untagged = await push_image(store, APP, "untagged")
    clock.pass_days(10)
    run = Run(store, clock, rule(keep_tags=["new"], delete_untagged_after="7d"))

    decisions, summary = await run.preview()
    assert decisions == {"old": False, "new": True, untagged.digest: False}
    assert (summary.repositories, summary.tags_kept, summary.tags_deleted, summary.manifests_deleted) == (2, 2, 2, 1)
    assert summary.bytes_freed == sum(blob.size for image in (old, untagged) for blob in image.blobs)
    assert summary.bytes_left == 0
    assert await all_tags(store, APP) == ["new", "old"]

    _, alone = await run.preview(APP)
    assert alone.bytes_freed == sum(blob.size for blob in untagged.blobs)  # the other repository has the same image
    result = await run()
    assert (result["tags_deleted"], result["manifests_deleted"]) == (2, 1)
    clock.pass_days(8)
    assert (await run())["manifests_deleted"] == 2
    assert await has(store, APP, new)


async def test_a_preview_says_what_stays_without_a_tag(store: StoredRegistry, clock: Clock) -> None:
    """Without `delete_untagged_after`, the preview says that deleting tags frees no space."""
    old, _ = await push_daily(store, clock, APP, "old", "new")
    _, summary = await Run(store, clock, rule(keep_last=1)).preview()
    assert (summary.bytes_freed, summary.bytes_left) == (0, sum(blob.size for blob in old.blobs))


async def test_patterns_that_apply_to_nothing_are_said(store: StoredRegistry, clock: Clock) -> None:
    """A pattern that matches no repository is reported. So is one that matches only repositories for which an earlier
    rule decides."""
    await push_daily(store, clock, APP, "a")
    run = Run(store, clock, rule("team/**,taem/**", keep_last=1), rule("team/app", keep_last=1))
    _, summary = await run.preview()
    assert summary.warnings == [
        "rule 1: the pattern taem/** applies to no hosted repository with content",
        "rule 2: the pattern team/app applies to no hosted repository with content",
    ]
    assert (await run())["warnings"] == summary.warnings


async def test_a_preview_of_all_repositories(
    store: StoredRegistry, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts what goes and stays in each repository with a rule. A page ends when enough tags were judged."""
    third = RepositoryName("team/third")
    for repo, count in ((APP, 3), (OTHER, 1), (third, 2), (RepositoryName("private/app"), 1)):
        await push_daily(store, clock, repo, *(f"t{number}" for number in range(count)))
    looked = RetentionPreview(Run(store, clock, rule(keep_last=1)).judge, store.retention, clock)

    async def page(after: str | None, limit: int = 10) -> tuple[list[tuple[str, int, int]], bool]:
        found = await looked.repositories(after, limit)
        return [(each.repository, each.tags_kept, each.tags_deleted) for each in found.items], found.more

    everything = [(APP, 1, 2), (OTHER, 1, 0), (third, 1, 1)]
    assert await page(None) == (everything, False)
    assert await page(None, 2) == (everything[:2], True)
    assert await page(OTHER) == (everything[2:], False)
    monkeypatch.setattr(preview, "MAX_JUDGED_TAGS", 3)
    assert await page(None) == (everything[:1], True)
    assert await page(APP) == (everything[1:], False)


async def test_a_preview_of_a_repository_without_a_rule(store: StoredRegistry, clock: Clock) -> None:
    run = Run(store, clock, rule(keep_last=1))
    for name in ("private/app", MIRRORED):
        with pytest.raises(NameUnknown, match=r"no .* rule in the settings applies to"):
            await run.preview(RepositoryName(name))


async def test_a_push_of_an_index_is_not_disturbed(store: StoredRegistry, clock: Clock) -> None:
    """Manifests that are pushed before their index have no tag yet. They are kept until the index is pushed."""
    everything = rule(delete_all=True, delete_untagged_after="0s")
    child = await push_image(store, APP, "child")
    clock.now += 600
    await Run(store, clock, everything)()
    await store.put_manifest(APP, index_of([child.descriptor]), [Tag("1")], by=BY)
    assert await has(store, APP, child)
    clock.pass_days(1)
    await Run(store, clock, everything)()
    assert not await has(store, APP, child)
