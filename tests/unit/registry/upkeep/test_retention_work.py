"""Tests of the retention job, which deletes tags and manifests by rules, and of its preview."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from registry.upkeep.retention import preview
from registry.upkeep.retention.preview import PreviewLine, RetentionPreview
from registry.upkeep.retention.retention_work import ACTOR, KIND
from storage.access import AuditQuery
from storage.content import Manifest
from storage.errors import ManifestUnknown, NameUnknown
from storage.jobs import Job, JobState, JobStopped
from storage.names import RepositoryName, Tag
from storage.patterns import NamePattern
from storage.retention import MAX_PAGE_ROWS, Retention, TagFacts, UnusedSince
from storage.store.stored_registry import StoredRegistry
from storage.tag_rules import ImmutableTags, TagPattern, TagRule
from storage.upkeep.job_runner import JobContext, run_job
from storage.upkeep.tag_changes import TagChanger
from tests.fakes.registry_content import BY, all_tags, index_of, push_image
from tests.fakes.retention_run import RetentionRun, rule
from tests.fakes.upkeep_store import APP, DAY, Clock, pull

OTHER = RepositoryName("team/other")
MIRRORED = RepositoryName("docker.io/library/ubuntu")


class HookedRetention:
    """A `Retention` that calls `before_delete` before each deletion of a tag."""

    def __init__(self, inner: Retention, before_delete: Callable[[TagFacts], Awaitable[None]]) -> None:
        self._inner = inner
        self._before_delete = before_delete

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def delete_tag(self, repo: RepositoryName, judged_tag: TagFacts, *arguments: Any) -> bool:
        await self._before_delete(judged_tag)
        return await self._inner.delete_tag(repo, judged_tag, *arguments)


async def push_daily(store: StoredRegistry, clock: Clock, repo: RepositoryName, *tags: str) -> list[Manifest]:
    """Pushes an image for each tag, one per day."""
    images = []
    for tag in tags:
        images.append(await push_image(store, repo, f"{repo} {tag}", tag))
        clock.pass_days(1)
    return images


async def has_manifest(store: StoredRegistry, repo: RepositoryName, manifest: Manifest) -> bool:
    try:
        await store.resolve_manifest(repo, manifest.digest)
    except ManifestUnknown:
        return False
    return True


async def test_tags_that_no_condition_keeps_are_deleted(store: StoredRegistry, clock: Clock) -> None:
    """Tags that no condition keeps are deleted, and their manifests stay. Other repositories do not change."""
    images = await push_daily(store, clock, APP, "v1", "a", "b", "c", "d")
    await push_daily(store, clock, RepositoryName("private/app"), "a", "b")
    await pull(store, APP, images[1].digest, clock)
    run = RetentionRun(store, clock, rule(keep_last=2, keep_tags=["v*"], keep_pulled_within="1d"))

    result = await run()

    assert await all_tags(store, APP) == ["a", "c", "d", "v1"]
    assert await all_tags(store, RepositoryName("private/app")) == ["a", "b"]
    assert await has_manifest(store, APP, images[2])
    counts = {"repositories": 1, "tags_kept": 4, "tags_deleted": 1, "manifests_deleted": 0}
    assert result == {**counts, "warnings": []}
    [step] = run.steps
    assert (step["action"], step["repository"], step["tag"], step["rule"]) == ("delete", APP, "b", 1)
    [entry] = store.accounts.audit(AuditQuery(actor=ACTOR.name), 10).items
    assert (entry.action, entry.target) == ("tag.delete", f"{APP}:b")


async def test_the_first_rule_that_matches_applies(store: StoredRegistry, clock: Clock) -> None:
    """If several rules match a repository, only the first one applies."""
    await push_daily(store, clock, APP, "a", "b", "c")
    await push_daily(store, clock, OTHER, "a", "b", "c")
    await RetentionRun(store, clock, rule("team/app", keep_last=2), rule("**", keep_last=1))()
    assert await all_tags(store, APP) == ["b", "c"]
    assert await all_tags(store, OTHER) == ["c"]


async def test_tags_of_mirrored_repositories_are_kept(store: StoredRegistry, clock: Clock) -> None:
    """Tags of mirrored repositories follow the upstream, so they are kept even if a rule matches the repository."""
    await push_daily(store, clock, MIRRORED, "a", "b")
    result = await RetentionRun(store, clock, rule("**", keep_last=1))()
    assert await all_tags(store, MIRRORED) == ["a", "b"]
    assert result["repositories"] == 0


async def test_a_pull_of_one_platform_keeps_the_whole_image(store: StoredRegistry, clock: Clock) -> None:
    """A pull of one platform keeps the index, the manifests of all platforms and their referrers."""
    children = [await push_image(store, APP, platform) for platform in ("amd64", "arm64")]
    index = index_of([child.descriptor for child in children])
    await store.put_manifest(APP, index, [Tag("1")], by=BY)
    signature = await push_image(store, APP, "signature", subject=children[1].digest)
    clock.pass_days(30)
    await pull(store, APP, children[0].digest, clock)
    retention_rule = rule(keep_pulled_within="14d", delete_untagged_after="0s")

    await RetentionRun(store, clock, retention_rule)()
    assert [await has_manifest(store, APP, manifest) for manifest in (index, *children, signature)] == [True] * 4

    clock.pass_days(15)
    result = await RetentionRun(store, clock, retention_rule)()
    assert [await has_manifest(store, APP, manifest) for manifest in (index, *children, signature)] == [False] * 4
    assert (result["tags_deleted"], result["manifests_deleted"]) == (1, 4)
    assert await store.metadata.queued_links(clock() + 1, 100)  # garbage collection frees the space


async def test_a_manifest_stays_for_a_while_after_its_tag(store: StoredRegistry, clock: Clock) -> None:
    """The time of `delete_untagged_after` begins when the manifest's tag is deleted."""
    old, _ = await push_daily(store, clock, APP, "old", "new")
    clock.pass_days(100)
    run = RetentionRun(store, clock, rule(keep_last=1, delete_untagged_after="7d"))
    assert (await run())["manifests_deleted"] == 0
    clock.pass_days(6)
    assert (await run())["manifests_deleted"] == 0
    assert await has_manifest(store, APP, old)
    clock.pass_days(2)
    assert (await run())["manifests_deleted"] == 1
    assert not await has_manifest(store, APP, old)


async def test_untagged_manifests_stay_by_default(store: StoredRegistry, clock: Clock) -> None:
    """Without `delete_untagged_after`, untagged manifests are kept, because deployments may name them by digest."""
    image = await push_image(store, APP, "untagged")
    clock.pass_days(1000)
    await RetentionRun(store, clock, rule(keep_last=1))()
    assert await has_manifest(store, APP, image)


async def test_a_tag_that_is_pushed_before_its_deletion_is_kept(store: StoredRegistry, clock: Clock) -> None:
    """A tag is kept if a client pushes it after the decision to delete it."""
    await push_daily(store, clock, APP, "a", "b", "c")

    async def push(judged: TagFacts) -> None:
        if judged.name == "a":
            await push_image(store, APP, "a, again", "a")

    run = RetentionRun(store, clock, rule(keep_last=1), retention=HookedRetention(store.retention, push))
    result = await run()
    assert await all_tags(store, APP) == ["a", "c"]
    assert [(step["tag"], step["action"]) for step in run.steps] == [("a", "keep"), ("b", "delete")]
    assert (result["tags_kept"], result["tags_deleted"]) == (2, 1)


async def test_the_report_says_that_a_tag_has_become_immutable(store: StoredRegistry, clock: Clock) -> None:
    """The report says whether a tag is kept because it has changed or because it has become immutable."""
    await push_daily(store, clock, APP, "a", "v1", "last")

    class RetentionWithNewRules(HookedRetention):
        async def tag_facts(self, *arguments: Any) -> Any:
            tags = await self._inner.tag_facts(*arguments)
            run.judge.immutable_tags = ImmutableTags([TagRule((NamePattern("team/app"),), (TagPattern("v*"),))])
            return tags

    async def push(judged: TagFacts) -> None:
        if judged.name == "a":
            await push_image(store, APP, "a, again", "a")

    run = RetentionRun(store, clock, rule(keep_last=1), retention=RetentionWithNewRules(store.retention, push))
    await run()
    reasons = {step["tag"]: step["reason"] for step in run.steps}
    assert reasons == {"a": "changed or pulled during this run", "v1": "it is immutable now"}


async def test_content_of_an_immutable_tag_is_kept(store: StoredRegistry, clock: Clock) -> None:
    """An immutable tag is kept, with its index, the manifests that the index lists, and their referrers."""
    child = await push_image(store, APP, "child")
    index = index_of([child.descriptor])
    await store.put_manifest(APP, index, [Tag("v1"), Tag("other")], by=BY)
    signature = await push_image(store, APP, "signature", subject=child.digest)
    deleted_image = await push_image(store, APP, "gone", "a")
    clock.pass_days(100)
    delete_everything = rule(delete_all=True, delete_untagged_after="0s")
    immutable_tags = ImmutableTags([TagRule((NamePattern("team/app"),), (TagPattern("v*"),))])
    run = RetentionRun(store, clock, delete_everything, immutable_tags=immutable_tags)

    lines: list[PreviewLine] = []
    await RetentionPreview(run.judge, store.retention, clock).run(lines.append)
    assert {entry.tag: entry.reason for entry in lines if entry.is_kept} == {"v1": "it is immutable"}
    result = await run()
    assert await all_tags(store, APP) == ["v1"]
    assert [await has_manifest(store, APP, each) for each in (index, child, signature, deleted_image)] == [
        True,
        True,
        True,
        False,
    ]
    assert (result["tags_kept"], result["tags_deleted"], result["manifests_deleted"]) == (1, 2, 1)


async def test_a_deleted_image_can_be_restored(store: StoredRegistry, clock: Clock) -> None:
    """A deleted image can be restored with all platforms and signatures until the grace period ends."""
    children = [await push_image(store, APP, platform) for platform in ("amd64", "arm64")]
    index = index_of([child.descriptor for child in children])
    await store.put_manifest(APP, index, [Tag("1")], by=BY)
    signature = await push_image(store, APP, "signature", subject=children[1].digest)
    image = [index, *children, signature]
    clock.pass_days(100)
    delete_everything = RetentionRun(store, clock, rule(delete_all=True, delete_untagged_after="0s"))
    assert (await delete_everything())["manifests_deleted"] == 4
    clock.now += DAY / 2
    await store.collector.collect()
    changes = TagChanger(store.tag_history, store.immutable_tags)
    await changes.restore(APP, Tag("1"), by=BY)
    assert [await has_manifest(store, APP, manifest) for manifest in image] == [True] * 4
    for manifest in image:
        for blob in manifest.blobs:
            await store.resolve_blob(APP, blob.digest)

    clock.pass_days(1)
    await delete_everything()
    clock.now += DAY + 1
    await store.collector.collect()
    with pytest.raises(ManifestUnknown):
        await changes.restore(APP, Tag("1"), by=BY)


async def test_a_stopped_job_continues_with_the_next_repository(
    store: StoredRegistry, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that is started again skips the repositories that it has finished. Its result counts them too."""
    monkeypatch.setattr("storage.upkeep.job_runner.SAVE_SECONDS", 0.0)
    names = [RepositoryName(f"team/{name}") for name in ("a", "b", "c")]
    for name in names:
        await push_daily(store, clock, name, "old", "new")
    job = await store.jobs.add(KIND, {}, actor="test", is_resumable=True)

    async def stop_in_second_repository(judged: TagFacts) -> None:
        if await all_tags(store, names[0]) == ["new"]:
            raise JobStopped

    interrupted = RetentionRun(
        store, clock, rule(keep_last=1), retention=HookedRetention(store.retention, stop_in_second_repository)
    )
    with pytest.raises(JobStopped):
        await interrupted.work(JobContext(job, store.jobs))
    stopped_job: Job = await store.jobs.job(job.id)
    assert await all_tags(store, names[1]) == ["new", "old"]

    for tag in ("later", "latest"):  # these stay, because the job has finished this repository
        await push_image(store, names[0], tag, tag)
    result = await run_job(
        JobContext(stopped_job, store.jobs), store.jobs, RetentionRun(store, clock, rule(keep_last=1)).work
    )
    assert [len(await all_tags(store, name)) for name in names] == [3, 1, 1]
    assert (result["repositories"], result["tags_deleted"]) == (3, 3)
    assert (await store.jobs.job(job.id)).state is JobState.DONE


async def test_a_killed_deletion_of_an_index_is_completed(store: StoredRegistry, clock: Clock) -> None:
    """If a run is killed after it has deleted an index, the next run deletes the manifests that the index listed."""
    children = [await push_image(store, APP, platform) for platform in ("amd64", "arm64")]
    index = index_of([child.descriptor for child in children])
    await store.put_manifest(APP, index, by=BY)
    clock.pass_days(2)
    await store.retention.delete_unused_orphan(
        APP, index.digest, UnusedSince(clock(), clock(), clock()), clock(), ACTOR
    )
    result = await RetentionRun(store, clock, rule(keep_last=1, delete_untagged_after="1d"))()
    assert result["manifests_deleted"] == 2


async def test_a_large_untagged_index_is_deleted_in_steps(store: StoredRegistry, clock: Clock) -> None:
    """The job deletes all manifests that a large index lists, in several transactions."""
    children = [await push_image(store, APP, str(number)) for number in range(25)]
    await store.put_manifest(APP, index_of([child.descriptor for child in children]), by=BY)
    clock.pass_days(2)
    result = await RetentionRun(store, clock, rule(keep_last=1, delete_untagged_after="1d"))()
    assert result["manifests_deleted"] == len(children) + 1


async def test_a_preview_predicts_a_run(store: StoredRegistry, clock: Clock) -> None:
    """A preview states what a run would delete and how many bytes this would free. It deletes nothing."""
    old, new = await push_daily(store, clock, APP, "old", "new")
    await push_image(store, OTHER, f"{APP} old", "old")
    await push_image(store, OTHER, f"{APP} new", "new")
    clock.pass_days(100)
    untagged = await push_image(store, APP, "untagged")
    clock.pass_days(10)
    run = RetentionRun(store, clock, rule(keep_tags=["new"], delete_untagged_after="7d"))

    decisions, summary = await run.preview()
    assert decisions == {"old": False, "new": True, untagged.digest: False}
    assert (summary.repositories, summary.tags_kept, summary.tags_deleted, summary.manifests_deleted) == (2, 2, 2, 1)
    assert summary.bytes_freed == sum(blob.size for image in (old, untagged) for blob in image.blobs)
    assert summary.bytes_left == 0
    assert await all_tags(store, APP) == ["new", "old"]

    _, app_summary = await run.preview(APP)
    # The bytes of `old` stay, because the other repository has the same image.
    assert app_summary.bytes_freed == sum(blob.size for blob in untagged.blobs)
    result = await run()
    assert (result["tags_deleted"], result["manifests_deleted"]) == (2, 1)
    clock.pass_days(8)
    assert (await run())["manifests_deleted"] == 2
    assert await has_manifest(store, APP, new)


async def test_a_preview_counts_content_that_stays_without_a_tag(store: StoredRegistry, clock: Clock) -> None:
    """If the manifests of deleted tags stay, `bytes_left` counts the bytes of their blobs."""
    old, _ = await push_daily(store, clock, APP, "old", "new")
    _, summary = await RetentionRun(store, clock, rule(keep_last=1)).preview()
    assert (summary.bytes_freed, summary.bytes_left) == (0, sum(blob.size for blob in old.blobs))


async def test_patterns_that_apply_to_no_repository_are_reported(store: StoredRegistry, clock: Clock) -> None:
    """A warning names each pattern that applies to no repository, for example because an earlier rule applies."""
    await push_daily(store, clock, APP, "a")
    run = RetentionRun(store, clock, rule("team/**,taem/**", keep_last=1), rule("team/app", keep_last=1))
    _, summary = await run.preview()
    assert summary.warnings == [
        "rule 1: the pattern taem/** applies to no hosted repository with content",
        "rule 2: the pattern team/app applies to no hosted repository with content",
    ]
    assert (await run())["warnings"] == summary.warnings


async def test_a_preview_of_all_repositories(
    store: StoredRegistry, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The preview counts the kept and deleted tags of each repository with a rule, in pages. A page ends after a
    limited number of tags."""
    third = RepositoryName("team/third")
    for repo, count in ((APP, 3), (OTHER, 1), (third, 2), (RepositoryName("private/app"), 1)):
        await push_daily(store, clock, repo, *(f"t{number}" for number in range(count)))
    retention_preview = RetentionPreview(RetentionRun(store, clock, rule(keep_last=1)).judge, store.retention, clock)

    async def page(after: str | None, limit: int = 10) -> tuple[list[tuple[str, int, int]], bool]:
        result = await retention_preview.repositories(after, limit)
        return [(each.repository, each.tags_kept, each.tags_deleted) for each in result.items], result.more

    all_previews = [(APP, 1, 2), (OTHER, 1, 0), (third, 1, 1)]
    assert await page(None) == (all_previews, False)
    assert await page(None, 2) == (all_previews[:2], True)
    assert await page(OTHER) == (all_previews[2:], False)
    monkeypatch.setattr(preview, "MAX_JUDGED_TAGS", 3)
    assert await page(None) == (all_previews[:1], True)
    assert await page(APP) == (all_previews[1:], False)


@pytest.mark.slow
async def test_totals_count_a_limited_number_of_tags(
    store: StoredRegistry, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the totals of one repository, the rule is applied to a limited number of tags. If there are more, the totals
    are not complete. A preview that lists the tags has no such limit."""
    names = [f"t{number:04}" for number in range(2 * MAX_PAGE_ROWS + 1)]
    await push_image(store, APP, "image", *names)
    retention_preview = RetentionPreview(RetentionRun(store, clock, rule(keep_last=1)).judge, store.retention, clock)

    async def totals() -> tuple[int, bool]:
        found = await retention_preview.totals(APP)
        return found.tags_kept + found.tags_deleted, found.complete

    assert await totals() == (len(names), True)
    monkeypatch.setattr(preview, "MAX_JUDGED_TAGS", MAX_PAGE_ROWS + 1)
    assert await totals() == (2 * MAX_PAGE_ROWS, False)
    lines: list[PreviewLine] = []
    summary = await retention_preview.run(lines.append, APP)
    assert (len(lines), summary.complete) == (len(names), True)


async def test_totals_count_a_limited_number_of_manifests(
    store: StoredRegistry, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the totals of one repository, a limited number of manifests is read and counted. If there are more, the
    totals are not complete."""
    for number in range(5):
        await push_image(store, APP, f"untagged {number}")
    tagged = await push_daily(store, clock, APP, "a", "b", "c")
    retention = RetentionRun(store, clock, rule(delete_all=True, delete_untagged_after="1h"))
    retention_preview = RetentionPreview(retention.judge, store.retention, clock)

    async def totals() -> tuple[int, bool]:
        found = await retention_preview.totals(APP)
        return found.manifests_deleted, found.complete

    assert await totals() == (5, True)
    monkeypatch.setattr(preview, "MAX_COUNTED_MANIFESTS", 5 + len(tagged) - 1)
    assert await totals() == (5, False)
    monkeypatch.setattr(preview, "MAX_COUNTED_MANIFESTS", 4)
    assert await totals() == (4, False)
    monkeypatch.undo()
    monkeypatch.setattr("storage.metadata.sqlite.upkeep.sqlite_retention.MAX_PAGE_ROWS", 4)
    assert await totals() == (5, True)
    monkeypatch.setattr(preview, "MAX_READ_MANIFESTS", 3)
    manifests_deleted, is_complete = await totals()
    assert manifests_deleted <= 4
    assert not is_complete


async def test_a_preview_of_a_repository_without_a_rule(store: StoredRegistry, clock: Clock) -> None:
    """There is no preview for a repository without a rule or for a mirrored repository."""
    run = RetentionRun(store, clock, rule(keep_last=1))
    for name in ("private/app", MIRRORED):
        with pytest.raises(NameUnknown, match=r"no .* rule in the settings applies to"):
            await run.preview(RepositoryName(name))


async def test_manifests_are_kept_until_their_index_is_pushed(store: StoredRegistry, clock: Clock) -> None:
    """New manifests without a tag are kept for a while, because a client pushes them before their index."""
    delete_everything = rule(delete_all=True, delete_untagged_after="0s")
    child = await push_image(store, APP, "child")
    clock.now += 600
    await RetentionRun(store, clock, delete_everything)()
    await store.put_manifest(APP, index_of([child.descriptor]), [Tag("1")], by=BY)
    assert await has_manifest(store, APP, child)
    clock.pass_days(1)
    await RetentionRun(store, clock, delete_everything)()
    assert not await has_manifest(store, APP, child)


async def test_nothing_that_was_pulled_is_deleted_after_the_server_was_off(store: StoredRegistry, clock: Clock) -> None:
    """The next run after a long outage of the server keeps images that were pulled shortly before the outage. This
    holds even before the server has recorded that it runs again. The preview agrees."""
    pulled, never_pulled, _ = await push_daily(store, clock, APP, "a", "b", "c")
    untagged = await push_image(store, APP, "untagged")
    clock.pass_days(20)
    await store.pulls.mark_pulls_recorded(clock())
    for manifest in (pulled, untagged):
        await pull(store, APP, manifest.digest, clock)
    clock.pass_days(20)
    run = RetentionRun(store, clock, rule(keep_last=1, keep_pulled_within="14d", delete_untagged_after="7d"))
    kept, _ = await run.preview()
    assert kept == {"a": True, "b": False, "c": True}
    await run()
    assert await all_tags(store, APP) == ["a", "c"]
    await store.pulls.mark_pulls_recorded(clock())
    await run()
    assert await all_tags(store, APP) == ["a", "c"]
    assert await has_manifest(store, APP, untagged)
    for _ in range(15 * 24):
        clock.now += DAY / 24
        await store.pulls.mark_pulls_recorded(clock())
    await run()
    assert await all_tags(store, APP) == ["c"]
    assert not await has_manifest(store, APP, untagged)
    assert not await has_manifest(store, APP, never_pulled)
