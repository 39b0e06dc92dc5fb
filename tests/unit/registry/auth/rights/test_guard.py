"""`Guarded` wraps a registry and checks the rights of the client for every method. Its errors do not tell whether a
repository exists."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar, cast

import pytest

from registry.auth.rights.guard import LIST_LIMITS, Guarded
from registry.auth.rights.principal import CATALOG, UNPRIVILEGED, Principal, open_principal
from storage.access import Action
from storage.composition import open_registry, prepare_data_dir
from storage.content import Page
from storage.errors import (
    BlobUnknown,
    BlobUploadUnknown,
    Denied,
    ManifestUnknown,
    NameUnknown,
    TooManyRequests,
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
    principal_with,
)
from tests.fakes.registry_content import BY, descriptor_of, push_blob, push_image, read_blob
from tests.fakes.store_accounts import acting_as

T = TypeVar("T")


class CallPassed(Exception):
    """Raised when the guard has passed a call to the registry."""


class PassingRegistry(RefusingRegistry):
    """A registry that raises `CallPassed` for every call that it gets from the guard."""

    async def handle(self, call: RegistryCall[T]) -> T:
        raise CallPassed


def protocol_methods() -> set[str]:
    """Returns the names of all methods of the protocol `Registry`."""
    return {
        name
        for part in (Reader, Writer, Deleter, Lister, Registry)
        for name, member in vars(part).items()
        if inspect.iscoroutinefunction(member) and not name.startswith("_")
    }


def test_every_method_of_the_protocol_is_guarded() -> None:
    """`CALLS` has a call for each method of the protocol `Registry`, so the tests below cover all methods."""
    assert {name.partition(",")[0] for name in CALLS} == protocol_methods()


@pytest.mark.parametrize("name", sorted(CALLS))
async def test_without_a_principal_every_call_is_refused(name: str) -> None:
    """Without a principal, the guard refuses every call."""
    with pytest.raises(Unauthorized):
        await CALLS[name](Guarded(PassingRegistry()), APP)


@pytest.mark.parametrize("name", sorted(CALLS))
async def test_with_every_right_each_call_is_passed_on(name: str) -> None:
    """For an admin, the guard passes every call on."""
    with acting_as(ROOT), pytest.raises(CallPassed):
        await CALLS[name](Guarded(PassingRegistry()), APP)


class WaitingRegistry(RefusingRegistry):
    """A registry whose calls wait until `is_open` is set. `waiting`: the number of calls that wait."""

    def __init__(self) -> None:
        self.waiting = 0
        self.is_open = asyncio.Event()

    async def handle(self, call: RegistryCall[T]) -> T:
        self.waiting += 1
        await self.is_open.wait()
        return cast("T", Page([]))


async def list_repositories(guarded: Guarded, principal: Principal, address: str) -> Page[RepositoryName]:
    """Lists the repositories for a client at this address."""
    with acting_as(principal, address=address):
        return await guarded.repositories(None, 10)


async def test_lists_of_one_visitor_do_not_delay_those_of_others() -> None:
    """Each account, and each network of anonymous clients, has one list of repositories in progress. Further lists of
    the same visitor wait, and are refused if too many wait already."""
    registry = WaitingRegistry()
    guarded = Guarded(registry)
    alice = principal_with("alice", ("team/**", PULL))
    most = LIST_LIMITS.max_pending_per_visitor
    anonymous = open_principal()
    clients = [(anonymous, "192.0.2.1")] * (most + 3) + [(anonymous, "192.0.2.2"), (alice, "192.0.2.1")]
    lists = [asyncio.create_task(list_repositories(guarded, *client)) for client in clients]
    done, _ = await asyncio.wait(lists, return_when=asyncio.FIRST_COMPLETED, timeout=30)  # a refused one
    assert done
    assert registry.waiting == 3  # one list of each visitor
    registry.is_open.set()
    results = await asyncio.gather(*lists, return_exceptions=True)
    refused = [index for index, result in enumerate(results) if isinstance(result, TooManyRequests)]
    assert refused == [most, most + 1, most + 2]
    assert registry.waiting == len(lists) - len(refused)


def needed_action(name: str) -> Action:
    return PUSH if name in WRITES else DELETE if name in DELETES else PULL


@pytest.mark.parametrize("name", sorted({*CALLS} - {"repositories"}))
async def test_each_call_needs_exactly_one_action(name: str) -> None:
    """Each call needs exactly one action on the repository. The call succeeds with only this action, and is refused
    with all other actions. A refused list of referrers is an empty list instead of an error."""
    every = PULL | PUSH | DELETE | Action.ADMIN
    with acting_as(principal_with("alice", ("team/**", needed_action(name)))):
        if name == "mount_blob":  # a mount needs a pull on the source as well
            with pytest.raises(BlobUnknown):
                await CALLS[name](Guarded(PassingRegistry()), APP)
        else:
            with pytest.raises(CallPassed):
                await CALLS[name](Guarded(PassingRegistry()), APP)
    with acting_as(principal_with("alice", ("team/**", every & ~needed_action(name)), ("other/**", every))):
        refused = await outcome(CALLS[name](Guarded(PassingRegistry()), APP))
    if name == "referrers":
        assert refused == ("OK", repr(Page([])))
    else:
        assert refused[0] in (BlobUnknown, ManifestUnknown, NameUnknown, Denied)


async def test_a_call_without_a_rule_is_refused() -> None:
    """If the guard has no rule for a call, it refuses the call, even to an admin."""
    for action in (PULL, PUSH, DELETE):
        call: RegistryCall[None] = RegistryCall("get_everything", action, APP)
        with acting_as(ROOT), pytest.raises(Unsupported):
            await Guarded(MemoryRegistry()).handle(call)


# Refusals do not tell whether a repository exists


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
    "principal", [UNPRIVILEGED, ANYBODY, principal_with(None, token={})], ids=["nothing", "everyone's", "token"]
)
@pytest.mark.slow
async def test_anonymous_clients_are_asked_to_log_in(inner: Registry, principal: Principal, name: str) -> None:
    """An anonymous client without the right gets Unauthorized for every call. The error is the same whether or not the
    repository exists."""
    with acting_as(principal):
        existing, missing = [await outcome(CALLS[name](Guarded(inner), repo)) for repo in (APP, NONE)]
    assert existing[0] is Unauthorized
    assert existing[:2] == missing[:2]
    assert str(existing).replace(APP, NONE) == str(missing)


@pytest.mark.parametrize("name", sorted(READS))
async def test_a_refused_read_looks_like_a_missing_repository(inner: Registry, name: str) -> None:
    """An account that may not read a repository gets the same error, with the same text, as for a repository that does
    not exist."""
    with acting_as(ALICE):
        existing, missing = [await outcome(READS[name](Guarded(inner), repo)) for repo in (APP, NONE)]
    assert existing[0] in (BlobUnknown, ManifestUnknown, NameUnknown)
    assert str(existing).replace(APP, NONE) == str(missing)
    unguarded = await outcome(READS[name](inner, NONE))
    assert missing == unguarded if isinstance(inner, StoredRegistry) else missing[:2] == unguarded[:2]


async def test_an_account_without_pull_sees_no_referrers(inner: Registry) -> None:
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
    for principal in (ALICE, principal_with("alice", ("team/**", PULL))):
        with acting_as(principal):
            existing, missing = [await outcome(CALLS[name](Guarded(inner), repo)) for repo in (APP, NONE)]
        assert existing[0] is Denied
        action = "push to" if name in WRITES else "delete from"
        assert existing[2] == f"alice may not {action} team/app"
        assert str(existing).replace(APP, NONE) == str(missing)


@pytest.mark.parametrize("name", sorted(CALLS))
@pytest.mark.slow
async def test_a_token_without_the_right_gets_insufficient_scope(inner: Registry, name: str) -> None:
    """If the account has the right but its token does not, the error is Unauthorized with `insufficient_scope`. So the
    client requests another token. This holds whether or not the repository exists."""
    every = PULL | PUSH | DELETE
    by_access = principal_with("alice", ("team/**", every), token={"team/web": every})
    by_limits = principal_with("alice", ("team/**", every), limits="web/**")
    for principal in (by_access, by_limits) if name != "repositories" else (by_access,):
        with acting_as(principal):
            for repo in (APP, NONE):
                with pytest.raises(Unauthorized) as refused:
                    await CALLS[name](Guarded(inner), repo)
                assert refused.value.reason == "insufficient_scope"


async def test_denials_of_accounts_are_reported(inner: Registry) -> None:
    """The guard reports each denial of an account, with the account, the action, and the name that the client used. It
    does not report refusals of anonymous clients, nor refusals because of a token's scope."""
    reports: list[tuple[str, Action, str]] = []
    guard = Guarded(inner, on_denied=lambda principal, action, name: reports.append((principal.name, action, name)))
    for principal in (ALICE, UNPRIVILEGED, principal_with("alice", ("team/**", PULL | PUSH), token={})):
        with acting_as(principal, "app"):
            for call in (READS["get_manifest"], WRITES["put_manifest"]):
                await outcome(call(guard, APP))
    assert reports == [("alice", PULL, "app"), ("alice", PUSH, "app")]


# Mounts, lists, sessions


async def test_a_mount_needs_push_on_the_target_and_pull_on_the_source(inner: Registry) -> None:
    """A mount needs `push` on the target and `pull` on the source. The error is the same for a source that the account
    may not read, a source that does not exist, and a source without the blob."""
    guard = Guarded(inner)
    with acting_as(principal_with("alice", ("mine/**", PULL | PUSH), ("other/**", PUSH))):
        target = RepositoryName("mine/app")
        refused = [await outcome(guard.mount_blob(target, LAYER, source, BY)) for source in (OTHER, NONE, target)]
        assert {each[:2] for each in refused} == {(BlobUnknown, "BLOB_UNKNOWN")}
        with pytest.raises(BlobUnknown):
            await guard.mount_blob(target, LAYER, ALL_NAMES, BY)
    with acting_as(principal_with("alice", ("mine/**", PUSH), ("other/**", PULL))):
        assert (await guard.mount_blob(target, LAYER, ALL_NAMES, BY)).digest == LAYER
        assert (await guard.mount_blob(target, LAYER, OTHER, BY)).digest == LAYER


async def test_a_mount_source_has_to_be_in_the_token(inner: Registry) -> None:
    """A client can mount only from repositories that its token allows to pull, even if its account may pull from more.
    This holds for a source that the request names, and for a mount without a source."""
    rights = (("mine/**", PUSH), ("other/**", PULL))
    target = RepositoryName("mine/app")
    for source in (OTHER, ALL_NAMES):
        with acting_as(principal_with("alice", *rights, token={"mine/app": PUSH})), pytest.raises(BlobUnknown):
            await Guarded(inner).mount_blob(target, LAYER, source, BY)
        with acting_as(principal_with("alice", *rights, token={"mine/app": PUSH, "other/app": PULL})):
            assert (await Guarded(inner).mount_blob(target, LAYER, source, BY)).digest == LAYER


async def test_the_list_has_only_repositories_that_may_be_pulled(inner: Registry) -> None:
    """The list of repositories has only those from which the client may pull. Hidden repositories do not make a page
    shorter."""
    guard = Guarded(inner)
    for number in range(5):
        await push_image(inner, RepositoryName(f"zoo/{number}"), "one", "latest")
    with acting_as(principal_with("alice", ("zoo/*", PULL), ("team/*", PUSH))):
        page = await guard.repositories(None, 3)
        assert (list(page.items), page.more) == (["zoo/0", "zoo/1", "zoo/2"], True)
        page = await guard.repositories("zoo/2", 3)
        assert (list(page.items), page.more) == (["zoo/3", "zoo/4"], False)
    with acting_as(principal_with("alice")):
        assert (await guard.repositories(None, 3)).items == []
    with acting_as(principal_with(None, ("other/*", PULL), token={CATALOG: PULL})):
        assert list((await guard.repositories(None, 3)).items) == ["other/app"]
    with acting_as(ROOT):
        assert len((await guard.repositories(None, 100)).items) == 7


async def test_an_upload_session_belongs_to_its_account(inner: Registry) -> None:
    """An upload session exists only for the account that started it. Another account gets BlobUploadUnknown, even if
    this account may push to the repository."""
    guard = Guarded(inner)
    alice, bob = (principal_with(name, ("team/**", PUSH)) for name in ("alice", "bob"))
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


async def test_a_push_and_a_pull_through_the_guard(inner: Registry) -> None:
    """A blob that was pushed through the guard can be read through the guard, with the same bytes."""
    with acting_as(principal_with("alice", ("team/**", PULL | PUSH))):
        blob = await push_blob(Guarded(inner), APP, b"through the guard")
        assert await read_blob(Guarded(inner), APP, blob.digest) == b"through the guard"
