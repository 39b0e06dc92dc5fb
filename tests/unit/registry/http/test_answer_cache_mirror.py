"""The response cache of a registry that also mirrors an upstream. Responses for mirrored repositories are never
*ready*, that is, never in the cache. The Host header can decide whether a path means a mirrored repository."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from registry.http.answer_cache import CACHE_BYTES
from storage.names import RepositoryName
from tests.fakes.answer_cache_site import APP, TAG, V2, AnswerCacheSite
from tests.fakes.app_in_process import running_app
from tests.fakes.registry_content import push_image

pytestmark = pytest.mark.slow

HUB: dict[str, Any] = {"name": "docker.io", "endpoints": ["http://127.0.0.1:9"], "prefetch": "off"}
"""The settings of an upstream that cannot be reached."""
PULLED = RepositoryName("docker.io/library/app")


@asynccontextmanager
async def mirroring(folder: Path, **upstream: Any) -> AsyncIterator[AnswerCacheSite]:
    """A registry with the mirror HUB (changed by `upstream`) and one pushed image."""
    async with running_app(folder, upstream=[{**HUB, **upstream}]) as service:
        yield AnswerCacheSite(service, folder, await push_image(service.hosted, APP, "x", "latest"))


async def store_as_pulled(site: AnswerCacheSite) -> str:
    """Stores an image from another process, as if the mirror had pulled it from the upstream. Returns its digest. The
    image has no tag. Its bytes are made from the seed "far": the same seed gives an image with the same digest."""
    async with site.other_process() as other:
        return str((await push_image(other, PULLED, "far")).digest)


@pytest.mark.parametrize("default", [False, True])
async def test_a_response_for_a_hosted_repository_is_cached(tmp_path: Path, default: bool) -> None:
    """The response for a hosted repository is cached. Without a default upstream, the repository is hosted because its
    name does not begin with the name of an upstream. With a default upstream, it is hosted because it was pushed."""
    async with mirroring(tmp_path / "data", default=default) as site:
        assert (await site.cached_answer(TAG)).body == site.image.body
        assert (await site.cached_answer(f"{V2}/tags/list")).json["tags"] == ["latest"]


@pytest.mark.parametrize("name", ["docker.io/library/app", "docker.io/app", "library/app", "app"])
async def test_a_response_for_a_mirrored_repository_is_never_cached(tmp_path: Path, name: str) -> None:
    """The response for a mirrored repository is not cached under any of the repository's names, because the response
    also depends on the time of the last request to the upstream."""
    async with mirroring(tmp_path / "data", default=True) as site:
        target = f"/v2/{name}/manifests/{await store_as_pulled(site)}"
        for method in ("GET", "HEAD"):
            assert (await site.never_ready(target, method)).status == 200


async def test_a_pushed_image_is_served_at_the_next_request(tmp_path: Path) -> None:
    """Before the first push to a name, the mirror responds, and its response is not cached. After the push, the next
    request gets the pushed image, and the response is cached."""
    async with mirroring(tmp_path / "data", default=True) as site:
        assert (await site.never_ready(f"/v2/app/manifests/{await store_as_pulled(site)}")).status == 200
        async with site.other_process() as other:
            image = await push_image(other, RepositoryName("app"), "ours", "1")
        assert (await site.request("GET", "/v2/app/manifests/1")).body == image.body
        assert (await site.cached_answer("/v2/app/manifests/1")).body == image.body


async def test_a_request_with_a_namespace_bypasses_the_cache(tmp_path: Path) -> None:
    """A request with the query parameter `ns` is not answered from the cache, because the path then means a repository
    of the upstream in `ns`."""
    async with mirroring(tmp_path / "data") as site:
        digest = await store_as_pulled(site)
        # The hosted repository has the same image, from the same seed, and the tag `1` for it.
        await push_image(site.service.hosted, RepositoryName("library/app"), "far", "1")
        path = f"/v2/library/app/manifests/{digest}"
        await site.cached_answer(path)
        assert (await site.never_ready(f"{path}?ns=docker.io"))["oci-namespace"] == "docker.io"


async def test_the_host_decides_whether_a_path_is_mirrored(tmp_path: Path) -> None:
    """An upstream can have a host name of its own. At this host, a path means a repository of the upstream. At other
    hosts, the same path means a hosted repository. The cache keeps the responses of the hosts apart."""
    async with mirroring(tmp_path / "data", hosts=["hub.test"]) as site:
        mirrored = await store_as_pulled(site)
        # Another seed than that of the mirrored image, so the two images have different digests.
        hosted = str((await push_image(site.service.hosted, RepositoryName("library/app"), "near")).digest)
        registry_host, mirror_host = ({"host": host} for host in ("registry.test", "hub.test"))
        for digest, right, wrong in ((hosted, registry_host, mirror_host), (mirrored, mirror_host, registry_host)):
            path = f"/v2/library/app/manifests/{digest}"
            answer = await (site.cached_answer if right is registry_host else site.never_ready)(path, headers=right)
            assert answer.status == 200
            assert (await site.never_ready(path, headers=wrong)).status != 200
        await site.cached_answer(TAG, headers=registry_host)
        assert not site.has_ready(TAG, {"host": "other.test"})
        await site.cached_answer(TAG, headers={"host": "other.test"})


async def test_host_names_count_toward_the_size_of_the_cache(tmp_path: Path) -> None:
    """The length of the Host header counts toward the size of the cache, so clients cannot make the cache larger with
    long host names."""
    async with mirroring(tmp_path / "data", hosts=["hub.test"]) as site:
        size, count = 16 * 1024, 1000
        host_headers = [{"host": f"{number}.{'x' * size}"} for number in range(count)]
        for headers in [each for each in host_headers for _ in range(2)]:
            assert (await site.request("GET", TAG, headers)).status == 200
        ready = [site.has_ready(TAG, headers) for headers in host_headers]
        assert ready[-1]
        assert sum(ready) * size <= CACHE_BYTES
