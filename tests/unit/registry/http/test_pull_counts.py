"""Which requests count as pulls of a manifest."""

from __future__ import annotations

import pytest

from registry.http import DistributionAPI
from registry.http.answer_cache import AnswerCache
from storage.content import Pull
from storage.memory_registry import MemoryRegistry
from tests.fakes.asgi_client import AsgiClient, CachedAnswerClient
from tests.unit.registry.conftest import REPO, V2, image, put_image


@pytest.fixture
def pulls() -> list[Pull]:
    return []


@pytest.fixture
def api(registry: MemoryRegistry, pulls: list[Pull]) -> DistributionAPI:
    # The first function returns the store's version, which never changes here. The second one says of every repository
    # that it is hosted, not mirrored. So the cache may keep all answers.
    cache = AnswerCache(lambda: 0, lambda repo: True)
    return DistributionAPI(registry, answer_cache=cache, count_pull=lambda pull, *_: pulls.append(pull))


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_read_of_a_manifest_is_a_pull(
    registry: MemoryRegistry, api: DistributionAPI, pulls: list[Pull], method: str
) -> None:
    """A request by tag or by digest counts as a pull of the manifest that it leads to."""
    digest = (await put_image(registry, "latest")).digest
    client = AsgiClient(api)
    for reference in ("latest", digest):
        assert (await client(method, f"{V2}/manifests/{reference}")).status == 200
    assert pulls == [(REPO, digest)] * 2


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_304_counts_as_a_pull(
    registry: MemoryRegistry, api: DistributionAPI, pulls: list[Pull], method: str
) -> None:
    """A request that gets 304 counts as a pull, because the client uses the image."""
    digest = (await put_image(registry, "latest")).digest
    answer = await AsgiClient(api)(method, f"{V2}/manifests/latest", {"if-none-match": f'"{digest}"'})
    assert answer.status == 304
    assert pulls == [(REPO, digest)]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_responses_from_the_cache_count_as_pulls(
    registry: MemoryRegistry, api: DistributionAPI, pulls: list[Pull], method: str
) -> None:
    """Each response from the response cache counts as a pull. `client.ready` says whether the last response came from
    the cache."""
    digest = (await put_image(registry, "latest")).digest
    client = CachedAnswerClient(api)
    cached = 0
    for _ in range(6):
        assert (await client(method, f"{V2}/manifests/latest")).status == 200
        cached += client.ready
    # The first responses come from the application, because a response is cached only after a repeated request.
    assert cached > 2
    assert pulls == [(REPO, digest)] * 6


async def test_a_large_manifest_counts_once(registry: MemoryRegistry, api: DistributionAPI, pulls: list[Pull]) -> None:
    """A pull of a large manifest counts once, although the handler can look the manifest up twice."""
    digest = (await put_image(registry, "latest", annotations={"a": "b" * 400_000})).digest
    assert (await AsgiClient(api)("GET", f"{V2}/manifests/latest")).status == 200
    assert pulls == [(REPO, digest)]


async def test_other_requests_do_not_count_as_pulls(
    registry: MemoryRegistry, api: DistributionAPI, pulls: list[Pull]
) -> None:
    """Pushes, lists, requests for blobs, deletes, and requests for manifests that do not exist do not count as
    pulls."""
    digest = (await put_image(registry, "latest")).digest
    client = AsgiClient(api)
    config = "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"  # the digest of `{}`
    for method, target, headers, body, status in (
        ("PUT", f"{V2}/manifests/latest", {"if-match": f'"{digest}"'}, image(), 201),
        ("PUT", f"{V2}/manifests/{digest}", {"if-match": f'"{digest}"'}, image(), 201),
        ("GET", f"{V2}/blobs/{config}", {}, b"", 200),
        ("GET", f"{V2}/tags/list", {}, b"", 200),
        ("GET", f"{V2}/referrers/{digest}", {}, b"", 200),
        ("GET", f"{V2}/manifests/none", {}, b"", 404),
        ("HEAD", "/v2/none/manifests/latest", {}, b"", 404),
        ("DELETE", f"{V2}/manifests/latest", {}, b"", 202),
    ):
        answer = await client(method, target, headers, body)
        assert answer.status == status, (method, target, answer.body)
    assert pulls == []
