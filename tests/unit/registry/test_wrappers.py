"""The wrappers around a registry. Each wrapper has the same methods as the registry, and refuses, restricts, logs or
forwards the calls."""

from __future__ import annotations

import inspect
import logging
from typing import Any, TypeVar

import pytest

from registry.auth.rights.guard import Guarded
from registry.http import DistributionAPI
from registry.observe import Observed
from registry.restrict import Restricted, restrict
from registry.router import Router
from storage.access import Action
from storage.content import OCI_MANIFEST, Actor, Manifest, digest_of
from storage.errors import Unsupported
from storage.interface import Deleter, Lister, Reader, Registry, Writer
from storage.memory_registry import MemoryRegistry
from storage.names import RepositoryName, Tag, UploadID
from storage.wrappers import Call, ForwardingRegistry, RefusingRegistry
from tests.fakes.asgi_client import AsgiClient
from tests.unit.registry.conftest import V2, image, put_blob, put_image

T = TypeVar("T")
REPO = RepositoryName("team/app")
BY = Actor("somebody", "192.0.2.1", "r1")
DIGEST = digest_of(b"x")
TAG = Tag("1")
SESSION = UploadID.random()


def calls_of(*protocols: type) -> list[str]:
    """Returns the names of the public methods of the protocols."""
    return [
        name for protocol in protocols for name, _ in inspect.getmembers(protocol, inspect.isfunction) if name[0] != "_"
    ]


def arguments(name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns valid arguments for a call."""
    arguments_of_calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
        "resolve_blob": ((REPO, DIGEST), {}),
        "open_blob": ((REPO, DIGEST), {}),
        "resolve_manifest": ((REPO, TAG), {}),
        "get_manifest": ((REPO, TAG), {}),
        "start_upload": ((REPO,), {}),
        "resume_upload": ((REPO, SESSION), {}),
        "upload_offset": ((REPO, SESSION), {}),
        "mount_blob": ((REPO, DIGEST, REPO, BY), {}),
        "put_manifest": ((REPO, Manifest.parse(image(), OCI_MANIFEST)), {"by": BY}),
        "delete_blob": ((REPO, DIGEST), {"by": BY}),
        "delete_manifest": ((REPO, DIGEST), {"by": BY}),
        "delete_tag": ((REPO, TAG), {"by": BY}),
        "repositories": ((None, 1), {}),
        "tags": ((REPO, None, 1), {}),
        "referrers": ((REPO, DIGEST, None, None, 1), {}),
    }
    return arguments_of_calls[name]


async def filled_registry() -> MemoryRegistry:
    """Returns a registry with a blob and a tagged image, so that most calls succeed."""
    registry = MemoryRegistry()
    await put_blob(registry, b"x")
    await put_image(registry, "1")
    return registry


async def outcome(registry: Registry, name: str) -> tuple[str, object]:
    """Returns the type and the text of the error that a call raises. If the call succeeds, returns an empty text and
    the result: of a reader or manifest, its descriptor; of a writer, the number of bytes in its session."""
    positional, keyword = arguments(name)
    try:
        result = await getattr(registry, name)(*positional, **keyword)
    except Exception as error:
        return type(error).__name__, str(error)
    return "", getattr(result, "descriptor", getattr(result, "offset", result))


@pytest.mark.parametrize("wrapper", [RefusingRegistry, ForwardingRegistry, Restricted, Observed, Guarded, Router])
def test_each_wrapper_defines_all_methods(wrapper: type) -> None:
    """Each wrapper defines every method of the interface. A wrapper would inherit a method that it does not define from
    the Protocol `Registry`, and the methods of the Protocol do nothing and return None."""
    for name in calls_of(Registry):
        assert getattr(wrapper, name).__module__ != "storage.interface", name


@pytest.mark.parametrize("name", calls_of(Registry))
async def test_refusing_registry_refuses_all_calls(name: str) -> None:
    """`RefusingRegistry` raises Unsupported for each call."""
    assert (await outcome(RefusingRegistry(), name))[0] == "Unsupported"


@pytest.mark.parametrize("name", calls_of(Registry))
async def test_forwarding_registry_returns_the_same(name: str) -> None:
    """Each call to `ForwardingRegistry` has the same result or error as on the inner registry, also if the inner
    registry has no content."""
    forwarding = ForwardingRegistry(await filled_registry())
    assert await outcome(forwarding, name) == await outcome(await filled_registry(), name)
    assert await outcome(ForwardingRegistry(MemoryRegistry()), name) == await outcome(MemoryRegistry(), name)


class RecordingRegistry(RefusingRegistry):
    """A registry that records all calls and refuses them."""

    def __init__(self) -> None:
        self.calls: list[Call[Any]] = []

    async def handle(self, call: Call[T]) -> T:
        self.calls.append(call)
        return await super().handle(call)


@pytest.mark.parametrize("name", calls_of(Registry))
async def test_a_call_has_its_action_and_arguments(name: str) -> None:
    """A `Call` has the action (pull, push or delete) of the Protocol that declares its method, so that no wrapper
    treats a write as a read. A `Call` also has the name of the repository. `invoke_on` makes the same call, with the
    same arguments, on another registry."""
    protocols = {Reader: Action.PULL, Lister: Action.PULL, Writer: Action.PUSH, Deleter: Action.DELETE}
    first_registry, second_registry = RecordingRegistry(), RecordingRegistry()
    await outcome(first_registry, name)
    (call,) = first_registry.calls
    assert call.operation == name
    assert [action for protocol, action in protocols.items() if name in calls_of(protocol)] == [call.action]
    assert call.repo == ("" if name == "repositories" else REPO)
    with pytest.raises(Unsupported):
        await call.invoke_on(second_registry)
    (second_call,) = second_registry.calls
    assert (second_call.operation, second_call.repo, second_call.args, second_call.options) == (
        call.operation,
        call.repo,
        call.args,
        call.options,
    )


def test_restrict_adds_no_wrapper_without_restrictions() -> None:
    """If the settings restrict no calls, `restrict` returns the registry itself."""
    inner = MemoryRegistry()
    assert restrict(inner, read_only=False, delete=True) is inner
    assert isinstance(restrict(inner, read_only=False, delete=False), Restricted)


@pytest.mark.parametrize("name", calls_of(Registry))
@pytest.mark.parametrize(("read_only", "delete"), [(False, True), (False, False), (True, True), (True, False)])
async def test_only_restricted_calls_are_refused(name: str, read_only: bool, delete: bool) -> None:
    """Only the restricted calls are refused. All other calls have the same result or error as on the inner
    registry."""
    is_refused = (read_only and name in calls_of(Writer, Deleter)) or (not delete and name in calls_of(Deleter))
    actual = await outcome(Restricted(await filled_registry(), read_only=read_only, delete=delete), name)
    if is_refused:
        assert actual[0] == "Unsupported"
    else:
        assert actual == await outcome(await filled_registry(), name)


@pytest.mark.parametrize("name", calls_of(Registry))
@pytest.mark.parametrize("level", [logging.DEBUG, logging.INFO])
async def test_observed_registry_returns_the_same_and_logs_each_call(
    name: str, level: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Each call has the same result or error as on the inner registry. At the level DEBUG, the wrapper writes one log
    line for each call, with the operation and the outcome."""
    for inner, same in ((MemoryRegistry(), MemoryRegistry()), (await filled_registry(), await filled_registry())):
        caplog.clear()
        with caplog.at_level(level, "registry.calls"):
            actual = await outcome(Observed(inner), name)
        assert actual == await outcome(same, name)
        lines = [record.getMessage() for record in caplog.records]
        assert len(lines) == (level == logging.DEBUG)
        for line in lines:
            assert f"operation={name} " in line
            assert (" outcome=OK " in line) == (not actual[0])


async def test_the_log_line_of_a_call_names_the_request(caplog: pytest.LogCaptureFixture) -> None:
    """The log line of a call has the address of the client and the id of the request, which is also in the
    response."""
    registry = MemoryRegistry()
    digest = await put_blob(registry, b"x")
    with caplog.at_level(logging.DEBUG, "registry.calls"):
        answer = await AsgiClient(DistributionAPI(Observed(registry)))("GET", f"{V2}/blobs/{digest}")
    (record,) = caplog.records
    line = record.getMessage()
    assert f"operation=open_blob repository=team/app reference={digest} outcome=OK ms=" in line
    assert line.endswith(f"address=192.0.2.7 request={answer['x-request-id']}")


async def test_an_upload_has_lines_for_its_start_and_end(caplog: pytest.LogCaptureFixture) -> None:
    """An upload has log lines for its start, its resumption and its end, but not for each chunk."""
    observed = Observed(MemoryRegistry())
    with caplog.at_level(logging.DEBUG, "registry.calls"):
        writer = await observed.start_upload(REPO)
        await writer.write(b"x")
        await writer.aclose()
        writer = await observed.resume_upload(REPO, writer.id, writer.offset)
        assert await writer.read_at(0, 5) == b"x"
        stored = await writer.commit(DIGEST)
        await (await observed.start_upload(REPO)).cancel()
    assert stored.digest == DIGEST
    operations = [record.getMessage().split(" ", 1)[0].removeprefix("operation=") for record in caplog.records]
    assert operations == ["start_upload", "resume_upload", "commit_upload", "start_upload", "cancel_upload"]


async def test_refused_calls_over_http(registry: MemoryRegistry) -> None:
    """A request that needs a restricted call gets 405 in the format of the distribution spec. The spec allows 400 and
    405 for disabled deletes."""
    await put_image(registry, "1")
    client = AsgiClient(DistributionAPI(Restricted(registry, delete=False)))
    answer = await client("DELETE", f"{V2}/manifests/1")
    assert (answer.status, answer.code) == (405, "UNSUPPORTED")
    assert "DELETE" not in answer["allow"]
    client = AsgiClient(DistributionAPI(Restricted(registry, read_only=True)))
    for method, path in (
        ("POST", f"{V2}/blobs/uploads/"),
        ("PUT", f"{V2}/manifests/1"),
        ("DELETE", f"{V2}/manifests/1"),
    ):
        answer = await client(method, path, body=image() if method == "PUT" else b"")
        assert (answer.status, answer.code) == (405, "UNSUPPORTED")
    assert (await client("GET", f"{V2}/manifests/1")).status == 200
