"""`Guarded` checks the rights for every method of a registry. Its errors do not tell whether a repository exists."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import pytest

from registry.auth.rights.guard import Guarded
from registry.auth.rights.principal import CATALOG, UNPRIVILEGED, Principal
from storage.access import Action
from storage.composition import open_registry, prepare_data_dir
from storage.errors import (
    BlobUnknown,
    BlobUploadUnknown,
    Denied,
    ManifestUnknown,
    NameUnknown,
    Unauthorized,
    Unsupported,
)
from storage.interface import Deleter, Lister, Reader, Registry, Writer
from storage.memory_registry import MemoryRegistry
from storage.names import RepositoryName
from storage.patterns import ALL_NAMES
from storage.store.stored_registry import StoredRegistry
from storage.wrappers import Call as RegistryCall
from storage.wrappers import RefusingRegistry
from tests.fakes.guarded_calls import (
    ALICE,
    ANYBODY,
    APP,
    CALLS,
    DELETE,
    DELETES,
    LATEST,
    LAYER,
    NONE,
    OTHER,
    PULL,
    PUSH,
    READS,
    ROOT,
    WRITES,
    outcome,
    who,
)
from tests.fakes.registry_content import BY, descriptor_of, push_blob, push_image, read_blob
from tests.fakes.store_accounts import acting_as

T = TypeVar("T")


class Touched(Exception):
    """The guard has passed a call on."""


class TouchedRegistry(RefusingRegistry):
    """Raises `Touched` for every call that the guard passes on."""

    async def handle(self, call: RegistryCall[T]) -> T:
        raise Touched


def protocol_methods() -> set[str]:
    return {
        name
        for part in (Reader, Writer, Deleter, Lister, Registry)
        for name, member in vars(part).items()
        if inspect.iscoroutinefunction(member) and not name.startswith("_")
    }


def test_every_method_of_the_protocol_is_guarded() -> None:
    """`CALLS` has a call of each method of the protocol `Registry`, so the tests below cover all methods."""
    assert {name.partition(",")[0] for name in CALLS} == protocol_methods()


@pytest.mark.parametrize("name", sorted(CALLS))
async def test_without_a_principal_no_call_comes_through(name: str) -> None:
    """Without a principal, the guard refuses every call."""
    with pytest.raises(Unauthorized):
        await CALLS[name](Guarded(TouchedRegistry()), APP)


@pytest.mark.parametrize("name", sorted(CALLS))
async def test_with_every_right_each_call_comes_through(name: str) -> None:
    """For an admin, the guard passes every call on."""
    with acting_as(ROOT), pytest.raises(Touched):
        await CALLS[name](Guarded(TouchedRegistry()), APP)


def needed(name: str) -> Action:
    return PUSH if name in WRITES else DELETE if name in DELETES else PULL


@pytest.mark.parametrize("name", sorted({*CALLS} - {"repositories"}))
async def test_each_call_takes_the_one_action_that_is_its_own(name: str) -> None:
    """Each call needs exactly one action on the repository. With this action alone the call succeeds. With all other
    actions it is refused."""
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
    """The guard refuses a call for which it has no rule, even to an admin."""
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
    """A registry with an image in `team/app` and the same image in `other/app`."""
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
    """An anonymous client without the right gets Unauthorized for every call. The error is the same whether or not the
    repository exists."""
    with acting_as(principal):
        there, missing = [await outcome(CALLS[name](Guarded(inner), repo)) for repo in (APP, NONE)]
    assert there[0] is Unauthorized
    assert there[:2] == missing[:2]
    assert str(there).replace(APP, NONE) == str(missing)


@pytest.mark.parametrize("name", sorted(READS))
async def test_an_account_that_may_not_read_gets_what_is_not_there(inner: Registry, name: str) -> None:
    """An account that may not read a repository gets the error of a repository that does not exist, with the same text
    as from the store."""
    with acting_as(ALICE):
        there, missing = [await outcome(READS[name](Guarded(inner), repo)) for repo in (APP, NONE)]
    assert there[0] in (BlobUnknown, ManifestUnknown, NameUnknown)
    assert str(there).replace(APP, NONE) == str(missing)
    real = await outcome(READS[name](inner, NONE))
    assert missing == real if isinstance(inner, StoredRegistry) else missing[:2] == real[:2]


async def test_who_may_not_pull_sees_no_referrers(inner: Registry) -> None:
    """An account that may not pull gets an empty list of referrers, as for a repository that does not exist."""
    subject = (await inner.get_manifest(APP, LATEST)).digest
    assert len((await inner.referrers(APP, subject, None, None, 10)).items) == 1
    with acting_as(ALICE):
        page = await Guarded(inner).referrers(APP, subject, None, None, 10)
    assert (list(page.items), page.more) == ([], False)


@pytest.mark.parametrize("name", sorted({**WRITES, **DELETES}))
async def test_an_account_that_may_not_write_is_denied(inner: Registry, name: str) -> None:
    """An account that may not push or delete gets Denied, even if it may pull. The text names the account, the action
    and the repository, and is the same if the repository does not exist."""
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
    """If the account has the right but its token does not, the error is Unauthorized with `insufficient_scope`, so that
    the client asks for another token. This holds whether or not the repository exists."""
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
    """The guard reports each denial of an account: the account, the action, and the name that the client used. It
    reports no refusals of anonymous clients, and none because of a token's scope."""
    heard: list[tuple[str, Action, str]] = []
    guard = Guarded(inner, denied=lambda principal, action, name: heard.append((principal.name, action, name)))
    for principal in (ALICE, UNPRIVILEGED, who("alice", ("team/**", PULL | PUSH), token={})):
        with acting_as(principal, "app"):
            for call in (READS["get_manifest"], WRITES["put_manifest"]):
                await outcome(call(guard, APP))
    assert heard == [("alice", PULL, "app"), ("alice", PUSH, "app")]


# Mounts, lists, sessions


async def test_a_mount_takes_a_push_there_and_a_pull_here(inner: Registry) -> None:
    """A mount needs `push` on the target and `pull` on the source. The error is the same for a source that the account
    may not read, a source that does not exist, and a source without the blob."""
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
    """A client can mount only from repositories that its token allows to pull, even if its account may pull from more.
    This holds for a source that the request names, and for a mount without a source."""
    rights = (("mine/**", PUSH), ("other/**", PULL))
    mine = RepositoryName("mine/app")
    for source in (OTHER, ALL_NAMES):
        with acting_as(who("alice", *rights, token={"mine/app": PUSH})), pytest.raises(BlobUnknown):
            await Guarded(inner).mount_blob(mine, LAYER, source, BY)
        with acting_as(who("alice", *rights, token={"mine/app": PUSH, "other/app": PULL})):
            assert (await Guarded(inner).mount_blob(mine, LAYER, source, BY)).digest == LAYER


async def test_a_list_shows_what_may_be_pulled(inner: Registry) -> None:
    """The list of repositories has only those that the client may pull from, and its pages are full."""
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
    """An upload session exists only for the account that started it: another account gets BlobUploadUnknown, even if it
    may push to the repository."""
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


async def test_rights_hold_for_a_push_that_goes_on(inner: Registry) -> None:
    """A blob that was pushed through the guard can be read through the guard, with the same bytes."""
    with acting_as(who("alice", ("team/**", PULL | PUSH))):
        blob = await push_blob(Guarded(inner), APP, b"through the guard")
        assert await read_blob(Guarded(inner), APP, blob.digest) == b"through the guard"
