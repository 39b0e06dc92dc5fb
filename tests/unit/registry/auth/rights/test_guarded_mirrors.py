"""`Guarded` in front of a router, which sends calls to hosted or mirrored repositories. To read a mirrored repository,
a client needs rights on its stored name, which begins with the upstream's name. Errors do not tell what exists."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from registry.auth.rights.guard import Guarded
from registry.auth.rights.principal import ANONYMOUS, Principal, Rights
from registry.naming import NamingRules
from registry.router import Router
from storage.content import BLOB_TYPE, Descriptor
from storage.errors import BlobUnknown, Denied, ManifestUnknown, NameUnknown, Unauthorized
from storage.interface import Registry
from storage.memory_registry import MemoryRegistry
from storage.names import Digest, RepositoryName
from tests.fakes.guarded_calls import (
    ALICE,
    APP,
    DELETE,
    DELETES,
    LATEST,
    LAYER,
    PULL,
    PUSH,
    READS,
    ROOT,
    outcome,
    principal_with,
)
from tests.fakes.registry_content import BY, descriptor_of, push_image, read_blob
from tests.fakes.store_accounts import acting_as

MIRRORED = RepositoryName("docker.io/team/app")


class GuardedRouter:
    """A router over registries in memory, with a guard. It has a default upstream (`docker_hub`, named docker.io) and a
    private one. If `during` is set, it is called while the mirror of docker.io looks for a blob."""

    def __init__(self) -> None:
        self.hosted = MemoryRegistry()
        self.docker_hub = MirrorStub(self)
        self.private = MemoryRegistry()
        self.pushed: set[str] = set()
        self.during: Callable[[], Awaitable[object]] | None = None
        mirrors: dict[str, Registry] = {"docker.io": self.docker_hub, "private.example": self.private}
        self.router = Router(self.hosted, mirrors, self.is_pushed, NamingRules(mirrors, default="docker.io"))
        self.guard = Guarded(self.router, self.router.naming, self.router.stored_name)

    async def is_pushed(self, repo: RepositoryName) -> bool:
        return repo in self.pushed

    async def push(self) -> None:
        await push_image(self.hosted, APP, "hosted", "latest")
        self.pushed.add(APP)


class MirrorStub(MemoryRegistry):
    """The mirror of docker.io. `asked` has the repositories in which a blob was looked for."""

    def __init__(self, site: GuardedRouter) -> None:
        super().__init__()
        self._site = site
        self.asked: list[str] = []

    async def resolve_blob(self, repo: RepositoryName, digest: Digest) -> Descriptor:
        self.asked.append(repo)
        if self._site.during is not None:
            await self._site.during()
        return await super().resolve_blob(repo, digest)


@pytest.fixture
async def site() -> GuardedRouter:
    """A `GuardedRouter` whose upstreams have images. Nothing was pushed to `team/app` here, but docker.io has a
    repository of this name."""
    router = GuardedRouter()
    await push_image(router.docker_hub, MIRRORED, "far", "latest")
    await push_image(router.docker_hub, RepositoryName("docker.io/library/ubuntu"), "ubuntu", "latest")
    await push_image(router.private, RepositoryName("private.example/team/app"), "private", "latest")
    return router


MIRRORED_LAYER, HOSTED_LAYER = descriptor_of(b"layer of far").digest, descriptor_of(b"layer of hosted").digest


@pytest.mark.parametrize("name", ["ubuntu", "library/ubuntu", "docker.io/ubuntu", "docker.io/library/ubuntu"])
async def test_a_grant_for_a_mirrored_repository_has_its_stored_name(site: GuardedRouter, name: str) -> None:
    """A grant on the stored name allows a pull under every name of the repository. A grant on a short name such as
    `ubuntu` does not allow a pull of the mirrored repository."""
    repo = RepositoryName(name)
    with acting_as(principal_with("alice", ("docker.io/library/*", PULL))):
        await site.guard.get_manifest(repo, LATEST)
    with acting_as(principal_with("alice", ("ubuntu", PULL), ("library/*", PULL))), pytest.raises(ManifestUnknown):
        await site.guard.get_manifest(repo, LATEST)


async def test_a_client_without_rights_on_the_mirror_gets_only_pushed_content(site: GuardedRouter) -> None:
    """Before the first push to `team/app`, a client that may read `team/app` but not `docker.io/team/app` finds
    nothing. The upstream gets no request. An anonymous client must not get a 401 here, because everyone may read the
    name. After the push, the client gets the pushed content."""
    for name in (None, "alice"):
        with acting_as(principal_with(name, ("team/**", PULL | PUSH | DELETE))):
            for call in READS.values():
                with pytest.raises((BlobUnknown, ManifestUnknown, NameUnknown)):
                    await call(site.guard, APP)
            for call in DELETES.values():
                with pytest.raises((BlobUnknown, NameUnknown)):
                    await call(site.guard, APP)
    assert site.docker_hub.asked == []
    await site.push()
    with acting_as(principal_with(None, ("team/**", PULL))):
        assert (await site.guard.get_manifest(APP, LATEST)).blobs[1].digest == HOSTED_LAYER


async def test_the_first_push_hides_the_mirrored_repository(site: GuardedRouter) -> None:
    """Before the first push to `team/app`, a client that may read `docker.io/team/app` but not `team/app` gets the
    mirrored content. After the push, the client finds nothing."""
    with acting_as(principal_with("alice", ("docker.io/**", PULL))):
        assert (await site.guard.get_manifest(APP, LATEST)).blobs[1].digest == MIRRORED_LAYER
        await site.push()
        for call in READS.values():
            with pytest.raises((BlobUnknown, ManifestUnknown, NameUnknown)):
                await call(site.guard, APP)
        assert (await site.guard.referrers(APP, MIRRORED_LAYER, None, None, 10)).items == []


async def test_a_first_push_during_a_mirrored_read_hides_the_blob(site: GuardedRouter) -> None:
    """If the first push to the name happens while the mirror looks for a blob, the client gets BlobUnknown. Its rights
    were checked for the mirrored repository, but the name now means the hosted repository."""
    site.pushed.add(MIRRORED)
    with acting_as(principal_with("alice", ("docker.io/**", PULL))):
        assert (await site.guard.resolve_blob(APP, MIRRORED_LAYER)).digest == MIRRORED_LAYER
        site.during = site.push
        with pytest.raises(BlobUnknown):
            await site.guard.resolve_blob(APP, MIRRORED_LAYER)
    assert site.docker_hub.asked == [MIRRORED, MIRRORED]


async def test_a_head_of_an_unpushed_name_sends_no_request_to_the_upstream(site: GuardedRouter) -> None:
    """Before a push, clients send a HEAD for each blob. If nothing was pushed to the name yet, the HEAD is not passed
    on to the upstream, so that the upstream does not learn private names. This also holds for a client that may pull
    from the upstream but not push."""
    with acting_as(principal_with("alice", ("docker.io/**", PULL))), pytest.raises(BlobUnknown):
        await site.guard.resolve_blob(APP, MIRRORED_LAYER)
    assert site.docker_hub.asked == []


async def test_a_push_copies_only_mirrored_blobs_that_may_be_pulled(site: GuardedRouter) -> None:
    """If a pushed manifest refers to blobs of the mirrored repository, the registry copies these blobs only for a
    client that may pull from the mirrored repository."""
    site.pushed.add(MIRRORED)
    image = await site.docker_hub.get_manifest(MIRRORED, LATEST)
    for blob in image.blobs:
        site.hosted.add_blob(MIRRORED, blob.digest, await read_blob(site.docker_hub, MIRRORED, blob.digest))
    with acting_as(principal_with("alice", ("team/**", PULL | PUSH))):
        assert (await outcome(site.guard.put_manifest(APP, image, [LATEST], by=BY)))[1] == "MANIFEST_BLOB_UNKNOWN"
    with acting_as(principal_with("alice", ("team/**", PULL | PUSH), ("docker.io/**", PULL))):
        await site.guard.put_manifest(APP, image, [LATEST], by=BY)


async def test_the_name_of_an_upstream_is_unknown_without_rights(site: GuardedRouter) -> None:
    """For an account that may not pull from the upstream, the error for the upstream's name is the same as for an
    unknown name."""
    with acting_as(ALICE):
        errors = [await outcome(site.guard.tags(RepositoryName(name), None, 1)) for name in ("docker.io", "unknown.io")]
        assert str(errors[0]).replace("docker", "unknown") == str(errors[1])
    with acting_as(ROOT), pytest.raises(NameUnknown, match="mirrored here"):
        await site.guard.tags(RepositoryName("docker.io"), None, 1)


async def test_pushes_to_mirrored_repositories_are_denied(site: GuardedRouter) -> None:
    """A push to a mirrored repository is denied. Only an account with the right to push learns that the repository is
    mirrored."""
    for principal, text in ((ROOT, "is mirrored from docker.io"), (ALICE, "alice may not push to docker.io/library/x")):
        with acting_as(principal), pytest.raises(Denied, match=text):
            await site.guard.start_upload(RepositoryName("docker.io/library/x"))


async def test_a_mount_from_a_mirrored_repository_needs_pull_on_its_stored_name(site: GuardedRouter) -> None:
    """A mount from a mirrored repository needs `pull` on the stored name of the source, whatever name the request
    gives."""
    ubuntu = RepositoryName("docker.io/library/ubuntu")
    site.hosted.add_blob(ubuntu, LAYER, b"layer of one")
    for source in ("ubuntu", "docker.io/library/ubuntu"):
        with acting_as(principal_with("alice", ("team/**", PUSH), ("ubuntu", PULL))), pytest.raises(BlobUnknown):
            await site.guard.mount_blob(APP, LAYER, RepositoryName(source), BY)
        with acting_as(principal_with("alice", ("team/**", PUSH), ("docker.io/**", PULL))):
            assert await site.guard.mount_blob(APP, LAYER, RepositoryName(source), BY) == Descriptor(
                BLOB_TYPE, LAYER, 12
            )


async def test_the_error_for_a_private_upstream_names_the_setting(site: GuardedRouter) -> None:
    """While there are no accounts, no grant can allow a pull from a private upstream. The error names the setting that
    allows the pull without a grant."""
    principal = Principal(ANONYMOUS, Rights.everything(["private.example"]), is_registry_open=True)
    with acting_as(principal):
        with pytest.raises(Unauthorized, match="require_grant = false"):
            await site.guard.get_manifest(RepositoryName("private.example/team/app"), LATEST)
        await site.guard.get_manifest(APP, LATEST)


async def test_a_tokens_scope_has_the_name_that_the_client_used(site: GuardedRouter) -> None:
    """A token's scope has the name that the client used, as in the challenge: for example `library/ubuntu` in a request
    with `ns=docker.io`. The guard gets the stored name, and compares the scope with the client's name."""
    rights = ("docker.io/**", PULL)
    stored = RepositoryName("docker.io/library/ubuntu")
    with acting_as(principal_with("alice", rights, token={"library/ubuntu": PULL}), "library/ubuntu"):
        await site.guard.get_manifest(stored, LATEST)
    with acting_as(principal_with("alice", rights, token={"library/ubuntu": PULL}), "library/debian"):
        assert (await outcome(site.guard.get_manifest(stored, LATEST)))[0] is Unauthorized
