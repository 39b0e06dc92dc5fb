"""The APIs that delete several tags at once, and that undo such a deletion."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from registry.browse.tag_removal import TagRemover
from storage.errors import ManifestTooLarge, StorageFailed, StorageFull
from storage.interface import Registry
from storage.names import Digest, RepositoryName, Tag
from storage.retention import DeletedOrphans
from storage.tag_history import TagMove
from storage.wrappers import Call, ForwardingRegistry
from tests.fakes.app_in_process import running_app
from tests.fakes.registry_content import BY, all_tags, index_of
from tests.fakes.store_accounts import add_grant
from tests.unit.registry.browse.conftest import APP, Site


@pytest.fixture(autouse=True)
async def cleaner(site: Site) -> None:
    """Adds the account `cleaner`, which may pull, push and delete."""
    site.logins["cleaner"] = await site.app.user("cleaner")
    await add_grant(site.app.accounts, "user:cleaner", "team/**", "pull,push,delete")


async def get_plan(site: Site, *tags: str) -> dict[str, Any]:
    document: dict[str, Any] = await site.json(f"{APP}/tag-removal-plan", "cleaner", "POST", {"tags": tags})
    return document


async def remove_tags(site: Site, *tags: str) -> dict[str, Any]:
    document: dict[str, Any] = await site.json(f"{APP}/tag-removal", "cleaner", "POST", {"tags": tags})
    return document


async def restore_tags(site: Site, removed: dict[str, Any]) -> dict[str, Any]:
    body = {"tags": removed["removed"]}
    document: dict[str, Any] = await site.json(f"{APP}/tag-restoration", "cleaner", "POST", body)
    return document


async def manifest_statuses(site: Site, *digests: Digest) -> list[int]:
    """Returns the status of a request for each of these manifests."""
    return [(await site.get(f"{APP}/manifests/{digest}/raw")).status for digest in digests]


async def test_manifests_are_removed_and_restored_with_their_tags(site: Site) -> None:
    """The plan lists the manifests that only the chosen tags refer to, with their signatures. The removal deletes these
    manifests, and the undo restores all of them."""
    single = await site.image("v1", layers=[b"own", b"shared"])
    shared = await site.image("v2", "other", layers=[b"shared"])
    child = await site.image(layers=[b"child"])
    index = index_of([child.descriptor])
    await site.registry.put_manifest(APP, index, [Tag("index")], by=BY)
    signature = await site.image(subject=single.digest, config=b"{}", layers=[b"signature"])
    old_signature = await site.image(f"{single.digest.replace(':', '-')}.sig", layers=[b"old signature"])
    chosen_tags = ["v1", "v2", "index", "none"]
    removed_digests = {single.digest, child.digest, index.digest, signature.digest, old_signature.digest}

    planned = await get_plan(site, *chosen_tags)
    assert [entry["tag"] for entry in planned["tags"]] == ["index", "v1", "v2"]
    assert [entry["digest"] for entry in planned["referrer_tags"]] == [old_signature.digest]
    assert (planned["unknown_tags"], planned["immutable_tags"], planned["complete"]) == (["none"], [], True)
    assert set(planned["manifests"]) == removed_digests
    # The config of `single` is not freed, because `shared` has the same config and stays.
    assert planned["freed_bytes"] == sum(map(len, (b"own", b"child", b"signature", b"{}", b"old signature")))

    removed = await remove_tags(site, *chosen_tags)
    assert (removed["manifests"], removed["refused"]) == (len(removed_digests), [])
    assert await all_tags(site.registry, APP) == ["other"]
    assert await manifest_statuses(site, *removed_digests, shared.digest) == [*[404] * len(removed_digests), 200]

    restored = await restore_tags(site, removed)
    assert (len(restored["restored"]), restored["refused"]) == (4, [])
    assert await manifest_statuses(site, *removed_digests) == [200] * len(removed_digests)
    assert await all_tags(site.registry, APP) == sorted(
        [*chosen_tags[:3], "other", f"sha256-{single.digest.encoded}.sig"]
    )


async def test_an_undo_changes_no_newer_tag(site: Site) -> None:
    """If a tag was pushed again after the removal, the undo does not change this tag. It restores the other tags."""
    await site.image("v1", "v2", layers=[b"old"])
    removed = await remove_tags(site, "v1", "v2")
    newer = await site.image("v1", layers=[b"newer"])
    restored = await restore_tags(site, removed)
    assert [entry["tag"] for entry in restored["restored"]] == ["v2"]
    assert [entry["tag"] for entry in restored["refused"]] == ["v1"]
    assert (await site.registry.resolve_manifest(APP, Tag("v1"))).digest == newer.digest


async def test_tags_that_are_removed_already(site: Site) -> None:
    """A second removal of the same tag removes nothing and is not an error."""
    await site.image("v1")
    await remove_tags(site, "v1", "v1")
    nothing = {"removed": [], "refused": [], "manifests": 0, "restorable": True, "problem": None}
    assert await remove_tags(site, "v1") == nothing


async def test_tags_that_moved_stay(site: Site) -> None:
    """If a request names the digest at which a tag pointed, and the tag has moved since, then the tag stays, with its
    image and signature."""
    old = await site.image("v1", layers=[b"old"])
    await site.image("v2", layers=[b"other"])
    new = await site.image("v1", layers=[b"new"])
    signature = f"sha256-{new.digest.encoded}.sig"
    await site.image(signature, layers=[b"signature"])
    body = {"tags": ["v1", "v2"], "digests": {"v1": old.digest}}
    answer = await site.json(f"{APP}/tag-removal", "cleaner", "POST", body)
    assert [entry["tag"] for entry in answer["removed"]] == ["v2"]
    assert [(entry["tag"], new.digest in entry["reason"]) for entry in answer["refused"]] == [("v1", True)]
    assert await all_tags(site.registry, APP) == [signature, "v1"]
    assert await manifest_statuses(site, new.digest) == [200]


class InterceptingRegistry(ForwardingRegistry):
    """A registry that calls a function before each tag is deleted. The function can move the tag, as another client
    would, or fail, as a disk would."""

    def __init__(self, inner: Registry, act: Callable[[Tag], Awaitable[None]]) -> None:
        super().__init__(inner)
        self._act = act

    async def handle(self, call: Call[Any]) -> Any:
        if call.operation == "delete_tag":
            tag: Any = call.args[0]
            await self._act(tag)
        return await self.forward(call)


def make_remover(site: Site, act: Callable[[Tag], Awaitable[None]], **parts: Any) -> TagRemover:
    """Returns a `TagRemover` that calls `act` before it deletes each tag."""
    assert site.app.app.service.access is not None
    store: Any = site.app.app.service.access.management.upkeep.store
    retention = parts.get("retention", store.retention)
    registry = InterceptingRegistry(site.registry, act)
    return TagRemover(registry, store.tag_removals, retention, store.tag_history, store.immutable_tags)


async def test_a_tag_that_moves_during_the_removal_stays(site: Site) -> None:
    """A tag that moves during the removal stays, with its manifests. The response lists only the tags that were
    deleted."""
    await site.image("v1", layers=[b"old"])
    other = await site.image("v2", layers=[b"other"])

    async def move(tag: Tag) -> None:
        if tag == "v1":
            await site.image("v1", layers=[b"new"])

    removed = await make_remover(site, move).remove(APP, [Tag("v1"), Tag("v2")], {}, BY)
    assert [(entry.tag, entry.digest) for entry in removed.removed] == [("v2", other.digest)]
    assert [entry.tag for entry in removed.refused] == ["v1"]
    assert await all_tags(site.registry, APP) == ["v1"]


async def test_an_error_does_not_end_the_removal(site: Site) -> None:
    """If the deletion of one tag fails, the response lists the tags that were deleted before and after the error. The
    image that stays keeps its signature."""
    images = [await site.image(f"v{number}", layers=[str(number).encode()]) for number in range(3)]
    signature = f"sha256-{images[1].digest.encoded}.sig"
    await site.image(signature, layers=[b"signature"])

    async def fail(tag: Tag) -> None:
        if tag == "v1":
            raise StorageFailed("the disk does not answer")

    tags = [Tag(f"v{number}") for number in range(3)]
    removed = await make_remover(site, fail).remove(APP, tags, {}, BY)
    assert [entry.tag for entry in removed.removed] == ["v0", "v2"]
    assert [(entry.tag, entry.reason) for entry in removed.refused] == [("v1", "the disk does not answer")]
    assert (removed.manifests, removed.restorable, removed.problem) == (2, True, None)
    assert await all_tags(site.registry, APP) == [signature, "v1"]


class FailingRetention:
    """A retention that does not touch the store. `delete_orphans` returns `orphans`, as if it had deleted these
    manifests. If `orphans` is None, it raises StorageFull."""

    def __init__(self, orphans: DeletedOrphans | None) -> None:
        self._orphans = orphans

    async def delete_orphans(self, *_: Any, **__: Any) -> DeletedOrphans:
        if self._orphans is None:
            raise StorageFull("no space")
        return self._orphans


@pytest.mark.parametrize(
    ("orphans", "outcome"),
    [
        (None, (0, True, "no space")),
        (DeletedOrphans([Digest("sha256:" + 64 * "0")], [], is_restorable=False), (1, False, None)),
    ],
)
async def test_the_response_states_problems_with_manifests(
    site: Site, orphans: DeletedOrphans | None, outcome: tuple[int, bool, str | None]
) -> None:
    """The response says if the manifests could not be removed, or if they were removed but cannot be restored."""
    await site.image("v1")

    async def nothing(tag: Tag) -> None:
        pass

    removed = await make_remover(site, nothing, retention=FailingRetention(orphans)).remove(APP, [Tag("v1")], {}, BY)
    assert [entry.tag for entry in removed.removed] == ["v1"]
    assert (removed.manifests, removed.restorable, removed.problem) == outcome


class FailingHistory:
    """A tag history that fails to restore the tags `v0` and `v1`."""

    async def move(self, repo: RepositoryName, tag: Tag, digest: Digest, **_: Any) -> TagMove:
        if tag == "v0":
            raise ManifestTooLarge("it is too large by now")
        if tag == "v1":
            raise StorageFull("no space")
        return TagMove(tag, digest, None, [])


async def test_tags_that_cannot_be_restored(site: Site) -> None:
    """The response lists each tag that could not be restored, with the reason, and the tags that were restored."""
    store: Any = site.app.app.service.access.management.upkeep.store  # type: ignore[union-attr]
    history: Any = FailingHistory()
    undo = TagRemover(site.registry, store.tag_removals, store.retention, history, store.immutable_tags)
    digest = Digest("sha256:" + 64 * "0")
    restored = await undo.restore(APP, [(Tag(f"v{number}"), digest) for number in range(3)], BY)
    assert [entry.tag for entry in restored.restored] == ["v2"]
    assert [entry.reason for entry in restored.refused] == ["it is too large by now", "no space"]


async def test_rights_to_remove_and_restore_tags(site: Site) -> None:
    """The removal needs `delete` and the undo needs `push`, as in `/v2`. For a caller without these rights, the error
    does not tell whether the repository exists."""
    await site.image("v1")
    digest = "sha256:" + 64 * "0"
    bodies = {
        "tag-removal-plan": {"tags": ["v1"]},
        "tag-removal": {"tags": ["v1"]},
        "tag-restoration": {"tags": [{"tag": "v1", "digest": digest}]},
    }
    for route, body in bodies.items():
        for name in (APP, "team/none"):
            assert (await site.get(f"{name}/{route}", "puller", "POST", body)).status == 403
            assert (await site.get(f"{name}/{route}", "other", "POST", body)).status == 403
            assert (await site.get(f"{name}/{route}", None, "POST", body)).status == 401
        assert (await site.get(f"team/none/{route}", "cleaner", "POST", body)).status == 404
    assert await all_tags(site.registry, APP) == ["v1"]


async def test_the_plan_needs_the_right_to_pull(site: Site) -> None:
    """The plan and the removal also need the right to pull, because their responses have digests. An account that may
    delete but not pull gets 404, as for a missing repository. An account that may not delete gets 403 before this
    check."""
    await site.image("v1")
    site.logins["blind"] = await site.app.user("blind")
    await add_grant(site.app.accounts, "user:blind", "team/**", "delete")
    for route in ("tag-removal-plan", "tag-removal"):
        assert (await site.get(f"{APP}/{route}", "blind", "POST", {"tags": ["v1"]})).status == 404
    assert await all_tags(site.registry, APP) == ["v1"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"tags": []}, 422),
        ({"tags": ["v"] * 201}, 422),
        ({"tags": ["-"]}, 400),
        ({"tags": ["v1"], "force": True}, 422),
        ({}, 422),
    ],
)
async def test_invalid_requests_are_refused(site: Site, body: Any, status: int) -> None:
    """Requests without tags, with too many tags, with an invalid tag, or with an unknown field are refused."""
    await site.image("v1")
    assert (await site.get(f"{APP}/tag-removal", "cleaner", "POST", body)).status == status


@pytest.fixture
async def strict_site(tmp_path: Path) -> AsyncIterator[Site]:
    """Yields a registry in which tags like `v1` are immutable."""
    rules = [{"repositories": ["team/**"], "tags": ["v*"]}]
    async with running_app(tmp_path / "strict", immutable=rules) as app:
        running_site = Site(app)
        running_site.logins = {"cleaner": await app.user("cleaner", admin=True)}
        yield running_site


async def test_immutable_tags_stay(strict_site: Site) -> None:
    """Immutable tags are not removed. Their images stay, and so do the signatures of these images."""
    image = await strict_site.image("v1", "latest")
    await strict_site.image(f"sha256-{image.digest.encoded}.sig", layers=[b"signature"])
    planned = await get_plan(strict_site, "v1", "latest")
    assert (planned["immutable_tags"], planned["manifests"], planned["referrer_tags"]) == (["v1"], [], [])
    removed = await remove_tags(strict_site, "v1", "latest")
    assert [entry["tag"] for entry in removed["refused"]] == ["v1"]
    assert await all_tags(strict_site.registry, APP) == [f"sha256-{image.digest.encoded}.sig", "v1"]


async def test_settings_that_forbid_deletes(tmp_path: Path) -> None:
    """If the settings forbid deletes, the plan and the removal get 405."""
    async with running_app(tmp_path / "strict", delete=False) as app:
        running_site = Site(app)
        running_site.logins = {"cleaner": await app.user("cleaner", admin=True)}
        await running_site.image("v1", repo=RepositoryName(APP))
        for route in ("tag-removal-plan", "tag-removal"):
            assert (await running_site.get(f"{APP}/{route}", "cleaner", "POST", {"tags": ["v1"]})).status == 405
