"""The context of a request, which holds the rights and the address of its client. Detached tasks run outside it."""

from __future__ import annotations

import asyncio

import pytest

from registry.http import DistributionAPI
from registry.request import (
    NO_REQUEST,
    UNAUTHENTICATED,
    UNRESTRICTED,
    RequestContext,
    current_request,
    detached_context,
    enter_request,
    leave_request,
    set_notice,
)
from registry.single_flight import SingleFlight
from storage.content import Manifest
from storage.memory_registry import MemoryRegistry
from storage.names import Reference, RepositoryName
from storage.wrappers import ForwardingRegistry
from tests.fakes.asgi_client import AsgiClient
from tests.unit.registry.conftest import V2, put_image


async def test_outside_a_request_nothing_is_allowed() -> None:
    """Outside a request, the principal has no rights, and code cannot change the principal, so background work cannot
    get rights. A notice to the client is dropped."""
    assert current_request() is NO_REQUEST
    assert NO_REQUEST.principal is UNAUTHENTICATED
    assert not NO_REQUEST.may_pull("team/app")
    set_notice("dropped")
    assert NO_REQUEST.notice is None
    with pytest.raises(AttributeError, match="no request"):
        NO_REQUEST.principal = UNRESTRICTED
    assert not NO_REQUEST.may_pull("team/app")


async def test_enter_and_leave_a_request() -> None:
    """Between `enter_request` and `leave_request`, the context is the current one, and a notice is stored in it."""
    request = RequestContext(UNRESTRICTED, "team/app", "192.0.2.1", "r1")
    token = enter_request(request)
    set_notice("may be outdated")
    assert current_request() is request
    leave_request(token)
    assert current_request() is NO_REQUEST
    assert request.notice == "may be outdated"
    assert request.may_pull("team/app")
    actor = request.actor
    assert (actor.name, actor.address, actor.request_id) == ("anonymous", "192.0.2.1", "r1")


async def test_a_detached_task_sees_no_request() -> None:
    """A task in a detached context has no request: it has no rights of a client, and its notices reach no client."""
    enter_request(request := RequestContext(UNRESTRICTED))

    async def work() -> bool:
        set_notice("belongs to no request")
        return current_request() is NO_REQUEST

    assert await asyncio.create_task(work(), context=detached_context())
    assert await SingleFlight[bool]().run("key", work)
    assert request.notice is None
    assert current_request() is request


class ContextRecordingRegistry(ForwardingRegistry):
    """A registry that records the request context of each read of a manifest."""

    def __init__(self, inner: MemoryRegistry) -> None:
        super().__init__(inner)
        self.contexts: list[RequestContext] = []

    async def get_manifest(self, repo: RepositoryName, reference: Reference) -> Manifest:
        self.contexts.append(current_request())
        return await super().get_manifest(repo, reference)


async def test_each_call_has_the_context_of_its_request(registry: MemoryRegistry) -> None:
    """Each call to the registry runs in the context of its own request, with the request's id, address and repository
    name."""
    await put_image(registry, "1")
    recording_registry = ContextRecordingRegistry(registry)
    client = AsgiClient(DistributionAPI(recording_registry))
    answers = await asyncio.gather(*(client("GET", f"{V2}/manifests/1") for _ in range(3)))
    assert {answer["x-request-id"] for answer in answers} == {
        request.request_id for request in recording_registry.contexts
    }
    assert len({id(request) for request in recording_registry.contexts}) == 3
    assert all(request.requested_name == "team/app" and request.address for request in recording_registry.contexts)
