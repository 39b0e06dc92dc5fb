"""`Guarded`: every method asks, refusals are those of the table, and none of them depends on what is there."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import pytest

from registry.auth.rights.guard import Guarded
from registry.auth.rights.principal import ANONYMOUS, CATALOG, UNPRIVILEGED, Identity, Principal, Rights
from registry.naming import NamingRules
from registry.router import Router
from storage.access import Action
from storage.composition import open_registry, prepare_data_dir
from storage.content import BLOB_TYPE, Descriptor, Span
from storage.errors import (
    BlobUnknown,
    BlobUploadUnknown,
    Denied,
    ManifestUnknown,
    NameUnknown,
    RegistryError,
    Unauthorized,
    Unsupported,
)
from storage.interface import Deleter, Lister, Reader, Registry, Writer
from storage.memory_registry import MemoryRegistry
from storage.names import Digest, RepositoryName, Tag, UploadID
from storage.patterns import ALL_NAMES, NameSet
from storage.store.stored_registry import StoredRegistry
from storage.wrappers import Call as RegistryCall
from storage.wrappers import RefusingRegistry
from tests.fakes.registry_content import BY, descriptor_of, image_of, push_blob, push_image, read_blob
from tests.fakes.store_accounts import acting_as, limit

APP, NONE = RepositoryName("team/app"), RepositoryName("team/non")
OTHER = RepositoryName("other/app")
LATEST = Tag("latest")
LAYER = descriptor_of(b"layer of one").digest
IMAGE = image_of(descriptor_of(b"{}", "application/x.test"))
UPLOAD = UploadID.random()

PULL, PUSH, DELETE = Action.PULL, Action.PUSH, Action.DELETE

Call = Callable[[Registry, RepositoryName], Awaitable[object]]

READS: Mapping[str, Call] = {
    "resolve_blob": lambda r, repo: r.resolve_blob(repo, LAYER),
    "open_blob": lambda r, repo: r.open_blob(repo, LAYER, Span(0, 2)),
    "resolve_manifest": lambda r, repo: r.resolve_manifest(repo, LATEST),
    "get_manifest": lambda r, repo: r.get_manifest(repo, LATEST),
    "tags": lambda r, repo: r.tags(repo, None, 10),
}
WRITES: Mapping[str, Call] = {
    "start_upload": lambda r, repo: r.start_upload(repo, by=BY),
    "resume_upload": lambda r, repo: r.resume_upload(repo, UPLOAD, by=BY),
    "upload_offset": lambda r, repo: r.upload_offset(repo, UPLOAD, by=BY),
    "mount_blob": lambda r, repo: r.mount_blob(repo, LAYER, OTHER, BY),
    "mount_blob, from anywhere": lambda r, repo: r.mount_blob(repo, LAYER, ALL_NAMES, BY),
    "put_manifest": lambda r, repo: r.put_manifest(repo, IMAGE, [LATEST], by=BY),
}
DELETES: Mapping[str, Call] = {
    "delete_blob": lambda r, repo: r.delete_blob(repo, LAYER, by=BY),
    "delete_manifest": lambda r, repo: r.delete_manifest(repo, LAYER, by=BY),
    "delete_tag": lambda r, repo: r.delete_tag(repo, LATEST, by=BY),
}
OTHERS: Mapping[str, Call] = {
    "referrers": lambda r, repo: r.referrers(repo, LAYER, None, None, 10),
    "repositories": lambda r, repo: r.repositories(None, 10),
}
CALLS = {**READS, **WRITES, **DELETES, **OTHERS}


T = TypeVar("T")


class Touched(Exception):
    """A call came through."""


class TouchedRegistry(RefusingRegistry):
    """Says of each call that it came through."""

    async def handle(self, call: RegistryCall[T]) -> T:
        raise Touched


def who(
    name: str | None, *access: tuple[str, Action], token: Mapping[str, Action] | None = None, limits: str | None = None
) -> Principal:
    """Somebody with these rights, perhaps by a token."""
    actions: dict[Action, list[str]] = {}
    for pattern, allowed in access:
        for action in Action:
            if action in allowed:
                actions.setdefault(action, []).append(pattern)
    proof = Identity(name, access=token, limits=(limit(limits, "*"),) if limits else None)
    return Principal(proof, Rights({action: NameSet.of(found) for action, found in actions.items()}))


ALICE = who("alice", ("own/**", PULL | PUSH | DELETE))
ANYBODY = who(None, ("own/**", PULL))
ROOT = Principal(Identity("root"), Rights.everything(admin=True))


async def outcome(call: Awaitable[object]) -> tuple[object, ...]:
    """What a client is told: what came, or the error's class and all that is in it."""
    try:
        return ("OK", repr(await call))
    except RegistryError as error:
        return (type(error), error.code, error.message, repr(error.detail))


def protocol_methods() -> set[str]:
    return {
        name
        for part in (Reader, Writer, Deleter, Lister, Registry)
        for name, member in vars(part).items()
        if inspect.iscoroutinefunction(member) and not name.startswith("_")
    }


def test_every_method_of_the_protocol_is_guarded() -> None:
    """Each has a call in these tests."""
    assert {name.partition(",")[0] for name in CALLS} == protocol_methods()


@pytest.mark.parametrize("name", sorted(CALLS))
async def test_without_a_principal_no_call_comes_through(name: str) -> None:
    """Fail closed: no method reaches what is behind the guard."""
    with pytest.raises(Unauthorized):
        await CALLS[name](Guarded(TouchedRegistry()), APP)


@pytest.mark.parametrize("name", sorted(CALLS))
async def test_with_every_right_each_call_comes_through(name: str) -> None:
    """And nothing but rights holds a call back."""
    with acting_as(ROOT), pytest.raises(Touched):
        await CALLS[name](Guarded(TouchedRegistry()), APP)


def needed(name: str) -> Action:
    return PUSH if name in WRITES else DELETE if name in DELETES else PULL


@pytest.mark.parametrize("name", sorted({*CALLS} - {"repositories"}))
async def test_each_call_takes_the_one_action_that_is_its_own(name: str) -> None:
    """All others are not enough, on this name; the one is."""
    every = PULL | PUSH | DELETE | Action.ADMIN
    with acting_as(who("alice", ("team/**", needed(name)))):
        if name == "mount_blob":  # it takes a pull on the source as well
            with pytest.raises(BlobUnknown):
                await CALLS[name](Guarded(TouchedRegistry()), APP)
        else:
            with pytest.raises(Touched):
                await CALLS[name](Guarded(TouchedRegistry()), APP)
    with acting_as(who("alice", ("team/**", every & ~needed(name)), ("other/**", every))):
        assert (await outcome(CALLS[name](Guarded(TouchedRegistry()), APP)))[0] != "OK" or name == "referrers"


async def test_a_method_nobody_thought_of_is_refused() -> None:
    """A call without a rule in Guarded is refused, whoever makes it."""
    for action in (PULL, PUSH, DELETE):
        call: RegistryCall[None] = RegistryCall("get_everything", action, APP)
        with acting_as(ROOT), pytest.raises(Unsupported):
            await Guarded(MemoryRegistry()).handle(call)


# What a refusal looks like


@asynccontextmanager
async def _memory(_: Path) -> AsyncIterator[Registry]:
    yield MemoryRegistry()


@asynccontextmanager
async def _stored(folder: Path) -> AsyncIterator[Registry]:
    prepare_data_dir(folder)
    async with open_registry(folder) as opened:
        yield opened


@pytest.fixture(params=["memory", "stored"])
async def inner(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Registry]:
    """With an image in `team/app` and the same in `other/app`."""
    make = {"memory": _memory, "stored": _stored}[request.param]
    async with make(tmp_path / "data") as opened:
        for repo in (APP, OTHER):
            image = await push_image(opened, repo, "one", "latest")
            await push_image(opened, repo, "signature", subject=image.digest)
        yield opened


@pytest.mark.parametrize("name", sorted(CALLS))
@pytest.mark.parametrize(
    "principal", [UNPRIVILEGED, ANYBODY, who(None, token={})], ids=["nothing", "everyone's", "token"]
)
@pytest.mark.slow
async def test_nobody_is_told_to_log_in(inner: Registry, principal: Principal, name: str) -> None:
    """Whatever they ask for, and whether it is there or not."""
    with acting_as(principal):
        there, missing = [await outcome(CALLS[name](Guarded(inner), repo)) for repo in (APP, NONE)]
    assert there[0] is Unauthorized
    assert there[:2] == missing[:2]
    assert str(there).replace(APP, NONE) == str(missing)


@pytest.mark.parametrize("name", sorted(READS))
async def test_an_account_that_may_not_read_gets_what_is_not_there(inner: Registry, name: str) -> None:
    """The same as of a repository that is missing where all may be read, in the very words of the store."""
    with acting_as(ALICE):
        there, missing = [await outcome(READS[name](Guarded(inner), repo)) for repo in (APP, NONE)]
    assert there[0] in (BlobUnknown, ManifestUnknown, NameUnknown)
    assert str(there).replace(APP, NONE) == str(missing)
    real = await outcome(READS[name](inner, NONE))
    assert missing == real if isinstance(inner, StoredRegistry) else missing[:2] == real[:2]


async def test_who_may_not_pull_sees_no_referrers(inner: Registry) -> None:
    """An empty list, as of a repository that is not there."""
    subject = (await inner.get_manifest(APP, LATEST)).digest
    assert len((await inner.referrers(APP, subject, None, None, 10)).items) == 1
    with acting_as(ALICE):
        page = await Guarded(inner).referrers(APP, subject, None, None, 10)
    assert (list(page.items), page.more) == ([], False)


@pytest.mark.parametrize("name", sorted({**WRITES, **DELETES}))
async def test_an_account_that_may_not_write_is_denied(inner: Registry, name: str) -> None:
    """In words that say who may not do what where, and are the same if it is not there; also for who may pull it."""
    for principal in (ALICE, who("alice", ("team/**", PULL))):
        with acting_as(principal):
            there, missing = [await outcome(CALLS[name](Guarded(inner), repo)) for repo in (APP, NONE)]
        assert there[0] is Denied
        doing = "push to" if name in WRITES else "delete from"
        assert there[2] == f"alice may not {doing} team/app"
        assert str(there).replace(APP, NONE) == str(missing)


@pytest.mark.parametrize("name", sorted(CALLS))
@pytest.mark.slow
async def test_a_token_that_is_not_enough_is_told_from_an_account_that_is_not(inner: Registry, name: str) -> None:
    """`insufficient_scope`, so that the client asks for a better token; there or not."""
    every = PULL | PUSH | DELETE
    short = who("alice", ("team/**", every), token={"team/web": every})
    limited = who("alice", ("team/**", every), limits="web/**")
    for principal in (short, limited) if name != "repositories" else (short,):
        with acting_as(principal):
            for repo in (APP, NONE):
                with pytest.raises(Unauthorized) as refused:
                    await CALLS[name](Guarded(inner), repo)
                assert refused.value.reason == "insufficient_scope"


async def test_denials_of_accounts_are_told(inner: Registry) -> None:
    """Who, what, and by which name; those of nobody and of short tokens are not."""
    heard: list[tuple[str, Action, str]] = []
    guard = Guarded(inner, denied=lambda principal, action, name: heard.append((principal.name, action, name)))
    for principal in (ALICE, UNPRIVILEGED, who("alice", ("team/**", PULL | PUSH), token={})):
        with acting_as(principal, "app"):
            for call in (READS["get_manifest"], WRITES["put_manifest"]):
                await outcome(call(guard, APP))
    assert heard == [("alice", PULL, "app"), ("alice", PUSH, "app")]


# Mounts, lists, sessions


async def test_a_mount_takes_a_push_there_and_a_pull_here(inner: Registry) -> None:
    """A source that may not be read, one that is missing and one without the blob are all the same."""
    guard = Guarded(inner)
    with acting_as(who("alice", ("mine/**", PULL | PUSH), ("other/**", PUSH))):
        mine = RepositoryName("mine/app")
        refused = [await outcome(guard.mount_blob(mine, LAYER, source, BY)) for source in (OTHER, NONE, mine)]
        assert {each[:2] for each in refused} == {(BlobUnknown, "BLOB_UNKNOWN")}
        with pytest.raises(BlobUnknown):
            await guard.mount_blob(mine, LAYER, ALL_NAMES, BY)
    with acting_as(who("alice", ("mine/**", PUSH), ("other/**", PULL))):
        assert (await guard.mount_blob(mine, LAYER, ALL_NAMES, BY)).digest == LAYER
        assert (await guard.mount_blob(mine, LAYER, OTHER, BY)).digest == LAYER


async def test_a_token_mounts_from_what_it_was_granted(inner: Registry) -> None:
    """By name and from anywhere; the account alone could."""
    rights = (("mine/**", PUSH), ("other/**", PULL))
    mine = RepositoryName("mine/app")
    for source in (OTHER, ALL_NAMES):
        with acting_as(who("alice", *rights, token={"mine/app": PUSH})), pytest.raises(BlobUnknown):
            await Guarded(inner).mount_blob(mine, LAYER, source, BY)
        with acting_as(who("alice", *rights, token={"mine/app": PUSH, "other/app": PULL})):
            assert (await Guarded(inner).mount_blob(mine, LAYER, source, BY)).digest == LAYER


async def test_a_list_shows_what_may_be_pulled(inner: Registry) -> None:
    """Whole pages of it, from the query."""
    guard = Guarded(inner)
    for number in range(5):
        await push_image(inner, RepositoryName(f"zoo/{number}"), "one", "latest")
    with acting_as(who("alice", ("zoo/*", PULL), ("team/*", PUSH))):
        page = await guard.repositories(None, 3)
        assert (list(page.items), page.more) == (["zoo/0", "zoo/1", "zoo/2"], True)
        page = await guard.repositories("zoo/2", 3)
        assert (list(page.items), page.more) == (["zoo/3", "zoo/4"], False)
    with acting_as(who("alice")):
        assert (await guard.repositories(None, 3)).items == []
    with acting_as(who(None, ("other/*", PULL), token={CATALOG: PULL})):
        assert list((await guard.repositories(None, 3)).items) == ["other/app"]
    with acting_as(ROOT):
        assert len((await guard.repositories(None, 100)).items) == 7


async def test_a_session_is_its_owners(inner: Registry) -> None:
    """Another account that may push there finds no such session; its owner goes on."""
    guard = Guarded(inner)
    alice, bob = (who(name, ("team/**", PUSH)) for name in ("alice", "bob"))
    with acting_as(alice):
        writer = await guard.start_upload(APP)
        await writer.write(b"bytes")
        await writer.aclose()
    with acting_as(bob):
        with pytest.raises(BlobUploadUnknown):
            await guard.resume_upload(APP, writer.id)
        with pytest.raises(BlobUploadUnknown):
            await guard.upload_offset(APP, writer.id)
    with acting_as(alice):
        assert await guard.upload_offset(APP, writer.id) == 5
        await (await guard.resume_upload(APP, writer.id)).commit(descriptor_of(b"bytes").digest)


# Names that lead elsewhere

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
    """An upstream's mirror."""

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
    """`team/app` is nobody's, and Docker Hub has one of that name."""
    made = GuardedRouter()
    await push_image(made.far, MIRRORED, "far", "latest")
    await push_image(made.far, RepositoryName("docker.io/library/ubuntu"), "ubuntu", "latest")
    await push_image(made.private, RepositoryName("private.example/team/app"), "private", "latest")
    return made


FAR, HOSTED = descriptor_of(b"layer of far").digest, descriptor_of(b"layer of hosted").digest


@pytest.mark.parametrize("name", ["ubuntu", "library/ubuntu", "docker.io/ubuntu", "docker.io/library/ubuntu"])
async def test_a_mirrors_content_is_granted_by_its_stored_name(site: GuardedRouter, name: str) -> None:
    """However it was asked for; a grant on the short name opens nothing."""
    repo = RepositoryName(name)
    with acting_as(who("alice", ("docker.io/library/*", PULL))):
        await site.guard.get_manifest(repo, LATEST)
    with acting_as(who("alice", ("ubuntu", PULL), ("library/*", PULL))), pytest.raises(ManifestUnknown):
        await site.guard.get_manifest(repo, LATEST)


async def test_who_may_have_the_name_but_not_the_mirrors_finds_nothing_there(site: GuardedRouter) -> None:
    """Also nobody, whom a 401 would send away from a name that is open to all; the upstream hears nothing. Once it is
    pushed, it is there."""
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
    """What was pushed under that name is not what they may read."""
    with acting_as(who("alice", ("docker.io/**", PULL))):
        assert (await site.guard.get_manifest(APP, LATEST)).blobs[1].digest == FAR
        await site.push()
        for call in READS.values():
            with pytest.raises((BlobUnknown, ManifestUnknown, NameUnknown)):
                await call(site.guard, APP)
        assert (await site.guard.referrers(APP, FAR, None, None, 10)).items == []


async def test_a_push_between_the_question_and_the_answer_opens_nothing(site: GuardedRouter) -> None:
    """A blob that is looked for while the name is first pushed: the answer would be of the wrong repository."""
    site.pushed.add(MIRRORED)
    with acting_as(who("alice", ("docker.io/**", PULL))):
        assert (await site.guard.resolve_blob(APP, FAR)).digest == FAR
        site.during = site.push
        with pytest.raises(BlobUnknown):
            await site.guard.resolve_blob(APP, FAR)
    assert site.far.asked == [MIRRORED, MIRRORED]


async def test_a_head_of_a_name_that_is_nobodys_asks_no_upstream(site: GuardedRouter) -> None:
    """Who pushes looks for blobs first; the upstream is told no private names, also where rights differ."""
    with acting_as(who("alice", ("docker.io/**", PULL))), pytest.raises(BlobUnknown):
        await site.guard.resolve_blob(APP, FAR)
    assert site.far.asked == []


async def test_a_push_does_not_bring_over_what_may_not_be_read(site: GuardedRouter) -> None:
    """A manifest that names a blob of the mirror's repository gets it for those who may pull there."""
    site.pushed.add(MIRRORED)
    image = await site.far.get_manifest(MIRRORED, LATEST)
    for blob in image.blobs:
        site.hosted.add_blob(MIRRORED, blob.digest, await read_blob(site.far, MIRRORED, blob.digest))
    with acting_as(who("alice", ("team/**", PULL | PUSH))):
        assert (await outcome(site.guard.put_manifest(APP, image, [LATEST], by=BY)))[1] == "MANIFEST_BLOB_UNKNOWN"
    with acting_as(who("alice", ("team/**", PULL | PUSH), ("docker.io/**", PULL))):
        await site.guard.put_manifest(APP, image, [LATEST], by=BY)


async def test_the_bare_name_of_an_upstream_tells_nothing_to_who_may_not_pull_there(site: GuardedRouter) -> None:
    """It is refused like any other name."""
    with acting_as(ALICE):
        seen = [await outcome(site.guard.tags(RepositoryName(name), None, 1)) for name in ("docker.io", "unknown.io")]
        assert str(seen[0]).replace("docker", "unknown") == str(seen[1])
    with acting_as(ROOT), pytest.raises(NameUnknown, match="mirrored here"):
        await site.guard.tags(RepositoryName("docker.io"), None, 1)


async def test_a_mirrors_repository_takes_no_push_and_says_so_to_who_could(site: GuardedRouter) -> None:
    """Others are told that they may not push there, and no more."""
    for principal, text in ((ROOT, "is mirrored from docker.io"), (ALICE, "alice may not push to docker.io/library/x")):
        with acting_as(principal), pytest.raises(Denied, match=text):
            await site.guard.start_upload(RepositoryName("docker.io/library/x"))


async def test_mounts_from_a_mirror_take_a_pull_on_its_stored_name(site: GuardedRouter) -> None:
    """By whichever name the source is given."""
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
    """There is nobody who could have a grant yet."""
    principal = Principal(ANONYMOUS, Rights.everything(["private.example"]), open=True)
    with acting_as(principal):
        with pytest.raises(Unauthorized, match="require_grant = false"):
            await site.guard.get_manifest(RepositoryName("private.example/team/app"), LATEST)
        await site.guard.get_manifest(APP, LATEST)


async def test_a_token_speaks_of_the_name_that_was_asked_by(site: GuardedRouter) -> None:
    """As the challenge does: `ns=docker.io` and `library/ubuntu` come here as the stored name."""
    rights = ("docker.io/**", PULL)
    stored = RepositoryName("docker.io/library/ubuntu")
    with acting_as(who("alice", rights, token={"library/ubuntu": PULL}), "library/ubuntu"):
        await site.guard.get_manifest(stored, LATEST)
    with acting_as(who("alice", rights, token={"library/ubuntu": PULL}), "library/debian"):
        assert (await outcome(site.guard.get_manifest(stored, LATEST)))[0] is Unauthorized


async def test_rights_hold_for_a_push_that_goes_on(inner: Registry) -> None:
    """A blob pushed and read through the guard is the one that was sent."""
    with acting_as(who("alice", ("team/**", PULL | PUSH))):
        blob = await push_blob(Guarded(inner), APP, b"through the guard")
        assert await read_blob(Guarded(inner), APP, blob.digest) == b"through the guard"
