"""The wrappers around a registry: those that refuse calls, those that restrict them, and those that write log lines."""

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


def calls_of(*protocols: type) -> list[str]:
    return [
        name for protocol in protocols for name, _ in inspect.getmembers(protocol, inspect.isfunction) if name[0] != "_"
    ]


def arguments(name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns valid arguments for a call."""
    given: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
        "resolve_blob": ((REPO, DIGEST), {}),
        "open_blob": ((REPO, DIGEST), {}),
        "resolve_manifest": ((REPO, TAG), {}),
        "get_manifest": ((REPO, TAG), {}),
        "start_upload": ((REPO,), {}),
        "resume_upload": ((REPO, UploadID.random()), {}),
        "upload_offset": ((REPO, UploadID.random()), {}),
        "mount_blob": ((REPO, DIGEST, None, BY), {}),
        "put_manifest": ((REPO, Manifest.parse(image(), OCI_MANIFEST)), {"by": BY}),
        "delete_blob": ((REPO, DIGEST), {"by": BY}),
        "delete_manifest": ((REPO, DIGEST), {"by": BY}),
        "delete_tag": ((REPO, TAG), {"by": BY}),
        "repositories": ((None, 1), {}),
        "tags": ((REPO, None, 1), {}),
        "referrers": ((REPO, DIGEST, None, None, 1), {}),
    }
    return given[name]


async def outcome(registry: Registry, name: str) -> str:
    """Returns the error with which a call ends; None if it succeeds."""
    positional, named = arguments(name)
    try:
        await getattr(registry, name)(*positional, **named)
    except Exception as error:
        return type(error).__name__
    return ""


@pytest.mark.parametrize("wrapper", [RefusingRegistry, ForwardingRegistry, Restricted, Observed, Guarded, Router])
def test_no_call_of_the_interface_is_inherited_from_the_protocol(wrapper: type) -> None:
    """Each wrapper defines every method of the interface, because the method of the Protocol itself would return
    None."""
    for name in calls_of(Registry):
        assert getattr(wrapper, name).__module__ != "storage.interface", name


@pytest.mark.parametrize("name", calls_of(Registry))
async def test_refusing_refuses(name: str) -> None:
    """`RefusingRegistry` raises Unsupported for each call."""
    assert await outcome(RefusingRegistry(), name) == "Unsupported"


@pytest.mark.parametrize("name", calls_of(Registry))
async def test_forwarding_answers_alike(name: str) -> None:
    """`ForwardingRegistry` returns what the inner registry returns."""
    assert await outcome(ForwardingRegistry(MemoryRegistry()), name) == await outcome(MemoryRegistry(), name)


class Recording(RefusingRegistry):
    """Records the calls it refuses."""

    def __init__(self) -> None:
        self.calls: list[Call[Any]] = []

    async def handle(self, call: Call[T]) -> T:
        self.calls.append(call)
        return await super().handle(call)


@pytest.mark.parametrize("name", calls_of(Registry))
async def test_a_call_says_what_it_does(name: str) -> None:
    """A call has the action of the Protocol that declares its method, so that no wrapper mistakes a write for a read.
    It names the repository. If the call is made again, it has the same arguments."""
    protocols = {Reader: Action.PULL, Lister: Action.PULL, Writer: Action.PUSH, Deleter: Action.DELETE}
    first, again = Recording(), Recording()
    await outcome(first, name)
    (call,) = first.calls
    assert call.operation == name
    assert [action for protocol, action in protocols.items() if name in calls_of(protocol)] == [call.action]
    assert call.repo == ("" if name == "repositories" else REPO)
    with pytest.raises(Unsupported):
        await call.invoke_on(again)
    (same,) = again.calls
    assert (same.operation, same.repo, same.args, same.options) == (call.operation, call.repo, call.args, call.options)


def test_nothing_is_wrapped_where_nothing_is_switched_off() -> None:
    """If nothing is restricted, `restrict` adds no wrapper."""
    inner = MemoryRegistry()
    assert restrict(inner, read_only=False, delete=True) is inner
    assert isinstance(restrict(inner, read_only=False, delete=False), Restricted)


@pytest.mark.parametrize("name", calls_of(Registry))
@pytest.mark.parametrize(("read_only", "delete"), [(False, True), (False, False), (True, True), (True, False)])
async def test_restricted(name: str, read_only: bool, delete: bool) -> None:
    """Only the restricted calls are refused. All others return what the inner registry returns."""
    off = (read_only and name in calls_of(Writer, Deleter)) or (not delete and name in calls_of(Deleter))
    expected = "Unsupported" if off else await outcome(MemoryRegistry(), name)
    assert await outcome(Restricted(MemoryRegistry(), read_only=read_only, delete=delete), name) == expected


@pytest.mark.parametrize("name", calls_of(Registry))
@pytest.mark.parametrize("level", [logging.DEBUG, logging.INFO])
async def test_observed_answers_alike_and_writes_one_line(
    name: str, level: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Each call returns what the inner registry returns, and writes one DEBUG line with its operation and outcome."""
    with caplog.at_level(level, "registry.calls"):
        failed = await outcome(Observed(MemoryRegistry()), name)
    assert failed == await outcome(MemoryRegistry(), name)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == (level == logging.DEBUG)
    for line in lines:
        assert f"operation={name} " in line
        assert (" outcome=OK " in line) == (not failed)


async def test_a_line_says_whose_call_it_was(caplog: pytest.LogCaptureFixture) -> None:
    """The line has the client's address and the request id that the response has, also for reads."""
    registry = MemoryRegistry()
    digest = await put_blob(registry, b"x")
    with caplog.at_level(logging.DEBUG, "registry.calls"):
        answer = await AsgiClient(DistributionAPI(Observed(registry)))("GET", f"{V2}/blobs/{digest}")
    (record,) = caplog.records
    line = record.getMessage()
    assert f"operation=open_blob repository=team/app reference={digest} outcome=OK ms=" in line
    assert line.endswith(f"address=192.0.2.7 request={answer['x-request-id']}")


async def test_an_upload_has_lines_for_its_start_and_end(caplog: pytest.LogCaptureFixture) -> None:
    """An upload writes a line at its start and one at its end, and none for each chunk."""
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


async def test_switched_off_over_http(registry: MemoryRegistry) -> None:
    """A restricted call gets 405 with the reason, in the format of the spec (the spec allows 400 and 405 for a disabled
    delete)."""
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
