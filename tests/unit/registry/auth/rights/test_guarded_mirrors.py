"""`Guarded` in front of a router: to read a mirrored repository, a client needs rights on its stored name. Errors do
not tell what exists."""

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
from tests.fakes.guarded_calls import ALICE, APP, DELETE, DELETES, LATEST, LAYER, PULL, PUSH, READS, ROOT, outcome, who
from tests.fakes.registry_content import BY, descriptor_of, push_image, read_blob
from tests.fakes.store_accounts import acting_as

MIRRORED = RepositoryName("docker.io/team/app")


class GuardedRouter:
    """A router with a default upstream and a private one, over registries in memory. `during` is called while the
    mirror answers."""

    def __init__(self) -> None:
        self.hosted = MemoryRegistry()
        self.far = MirrorStub(self)
        self.private = MemoryRegistry()
        self.pushed: set[str] = set()
        self.during: Callable[[], Awaitable[object]] | None = None
        mirrors: dict[str, Registry] = {"docker.io": self.far, "private.example": self.private}
        self.router = Router(self.hosted, mirrors, self.known, NamingRules(mirrors, default="docker.io"))
        self.guard = Guarded(self.router, self.router.naming, self.router.stored_name)

    async def known(self, repo: RepositoryName) -> bool:
        return repo in self.pushed

    async def push(self) -> None:
        await push_image(self.hosted, APP, "hosted", "latest")
        self.pushed.add(APP)


class MirrorStub(MemoryRegistry):
    """The mirror of Docker Hub. `asked`: the repositories in which a blob was looked for."""

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
    """Nothing was pushed to `team/app`, and Docker Hub has a repository of this name."""
    made = GuardedRouter()
    await push_image(made.far, MIRRORED, "far", "latest")
    await push_image(made.far, RepositoryName("docker.io/library/ubuntu"), "ubuntu", "latest")
    await push_image(made.private, RepositoryName("private.example/team/app"), "private", "latest")
    return made


FAR, HOSTED = descriptor_of(b"layer of far").digest, descriptor_of(b"layer of hosted").digest


@pytest.mark.parametrize("name", ["ubuntu", "library/ubuntu", "docker.io/ubuntu", "docker.io/library/ubuntu"])
async def test_a_mirrors_content_is_granted_by_its_stored_name(site: GuardedRouter, name: str) -> None:
    """A grant on the stored name allows a pull under every name of the repository. A grant on a short name such as
    `ubuntu` does not."""
    repo = RepositoryName(name)
    with acting_as(who("alice", ("docker.io/library/*", PULL))):
        await site.guard.get_manifest(repo, LATEST)
    with acting_as(who("alice", ("ubuntu", PULL), ("library/*", PULL))), pytest.raises(ManifestUnknown):
        await site.guard.get_manifest(repo, LATEST)


async def test_who_may_have_the_name_but_not_the_mirrors_finds_nothing_there(site: GuardedRouter) -> None:
    """A client that may read `team/app` but not `docker.io/team/app` finds nothing before the first push. This also
    holds for an anonymous client, which must not get a 401 for a name that everyone may read. The upstream gets no
    request. After the push, the client finds the pushed content."""
    for name in (None, "alice"):
        with acting_as(who(name, ("team/**", PULL | PUSH | DELETE))):
            for call in READS.values():
                with pytest.raises((BlobUnknown, ManifestUnknown, NameUnknown)):
                    await call(site.guard, APP)
            for call in DELETES.values():
                with pytest.raises((BlobUnknown, NameUnknown)):
                    await call(site.guard, APP)
    assert site.far.asked == []
    await site.push()
    with acting_as(who(None, ("team/**", PULL))):
        assert (await site.guard.get_manifest(APP, LATEST)).blobs[1].digest == HOSTED


async def test_who_may_have_the_mirrors_but_not_the_name_loses_it_with_the_first_push(site: GuardedRouter) -> None:
    """A client that may read `docker.io/team/app` but not `team/app` finds nothing after the first push to
    `team/app`."""
    with acting_as(who("alice", ("docker.io/**", PULL))):
        assert (await site.guard.get_manifest(APP, LATEST)).blobs[1].digest == FAR
        await site.push()
        for call in READS.values():
            with pytest.raises((BlobUnknown, ManifestUnknown, NameUnknown)):
                await call(site.guard, APP)
        assert (await site.guard.referrers(APP, FAR, None, None, 10)).items == []


async def test_a_push_between_the_question_and_the_answer_opens_nothing(site: GuardedRouter) -> None:
    """If the first push to the name happens while the mirror looks for a blob, the client gets BlobUnknown: its rights
    were checked for the mirrored repository, and the name now means the hosted one."""
    site.pushed.add(MIRRORED)
    with acting_as(who("alice", ("docker.io/**", PULL))):
        assert (await site.guard.resolve_blob(APP, FAR)).digest == FAR
        site.during = site.push
        with pytest.raises(BlobUnknown):
            await site.guard.resolve_blob(APP, FAR)
    assert site.far.asked == [MIRRORED, MIRRORED]


async def test_a_head_of_a_name_that_is_nobodys_asks_no_upstream(site: GuardedRouter) -> None:
    """A HEAD of a blob, which clients send before a push, is not passed on to the upstream, so that the upstream does
    not learn private names. This also holds for a client that may pull from the upstream but not push."""
    with acting_as(who("alice", ("docker.io/**", PULL))), pytest.raises(BlobUnknown):
        await site.guard.resolve_blob(APP, FAR)
    assert site.far.asked == []


async def test_a_push_does_not_bring_over_what_may_not_be_read(site: GuardedRouter) -> None:
    """If a pushed manifest refers to blobs of the mirrored repository, these are copied only for a client that may pull
    there."""
    site.pushed.add(MIRRORED)
    image = await site.far.get_manifest(MIRRORED, LATEST)
    for blob in image.blobs:
        site.hosted.add_blob(MIRRORED, blob.digest, await read_blob(site.far, MIRRORED, blob.digest))
    with acting_as(who("alice", ("team/**", PULL | PUSH))):
        assert (await outcome(site.guard.put_manifest(APP, image, [LATEST], by=BY)))[1] == "MANIFEST_BLOB_UNKNOWN"
    with acting_as(who("alice", ("team/**", PULL | PUSH), ("docker.io/**", PULL))):
        await site.guard.put_manifest(APP, image, [LATEST], by=BY)


async def test_the_bare_name_of_an_upstream_tells_nothing_to_who_may_not_pull_there(site: GuardedRouter) -> None:
    """For an account that may not pull from the upstream, the upstream's name is refused like an unknown name."""
    with acting_as(ALICE):
        seen = [await outcome(site.guard.tags(RepositoryName(name), None, 1)) for name in ("docker.io", "unknown.io")]
        assert str(seen[0]).replace("docker", "unknown") == str(seen[1])
    with acting_as(ROOT), pytest.raises(NameUnknown, match="mirrored here"):
        await site.guard.tags(RepositoryName("docker.io"), None, 1)


async def test_a_mirrors_repository_takes_no_push_and_says_so_to_who_could(site: GuardedRouter) -> None:
    """A push to a mirrored repository is denied. Only an account with the right to push learns that the repository is
    mirrored."""
    for principal, text in ((ROOT, "is mirrored from docker.io"), (ALICE, "alice may not push to docker.io/library/x")):
        with acting_as(principal), pytest.raises(Denied, match=text):
            await site.guard.start_upload(RepositoryName("docker.io/library/x"))


async def test_mounts_from_a_mirror_take_a_pull_on_its_stored_name(site: GuardedRouter) -> None:
    """A mount from a mirrored repository needs `pull` on the stored name of the source, whatever name the request
    gives."""
    ubuntu = RepositoryName("docker.io/library/ubuntu")
    site.hosted.add_blob(ubuntu, LAYER, b"layer of one")
    for source in ("ubuntu", "docker.io/library/ubuntu"):
        with acting_as(who("alice", ("team/**", PUSH), ("ubuntu", PULL))), pytest.raises(BlobUnknown):
            await site.guard.mount_blob(APP, LAYER, RepositoryName(source), BY)
        with acting_as(who("alice", ("team/**", PUSH), ("docker.io/**", PULL))):
            assert await site.guard.mount_blob(APP, LAYER, RepositoryName(source), BY) == Descriptor(
                BLOB_TYPE, LAYER, 12
            )


async def test_a_private_upstream_in_an_open_registry_says_what_to_do(site: GuardedRouter) -> None:
    """While there are no accounts, no grant can allow a pull from a private upstream. The error names the setting that
    removes the need for a grant."""
    principal = Principal(ANONYMOUS, Rights.everything(["private.example"]), open=True)
    with acting_as(principal):
        with pytest.raises(Unauthorized, match="require_grant = false"):
            await site.guard.get_manifest(RepositoryName("private.example/team/app"), LATEST)
        await site.guard.get_manifest(APP, LATEST)


async def test_a_token_speaks_of_the_name_that_was_asked_by(site: GuardedRouter) -> None:
    """A token's scope has the name that the client used, as in the challenge: `library/ubuntu` with `ns=docker.io`. The
    guard gets the stored name, and compares the scope with the name that the client used."""
    rights = ("docker.io/**", PULL)
    stored = RepositoryName("docker.io/library/ubuntu")
    with acting_as(who("alice", rights, token={"library/ubuntu": PULL}), "library/ubuntu"):
        await site.guard.get_manifest(stored, LATEST)
    with acting_as(who("alice", rights, token={"library/ubuntu": PULL}), "library/debian"):
        assert (await outcome(site.guard.get_manifest(stored, LATEST)))[0] is Unauthorized
