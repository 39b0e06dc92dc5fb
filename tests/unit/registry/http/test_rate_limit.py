"""The limit on the rate of requests per client address, in one application and in a server with two workers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import httpx2
import pytest

from registry import service_factory
from registry.app import create_app
from registry.config import Settings
from registry.config.settings import LimitSettings
from registry.http import DistributionAPI
from registry.http.rate_limit import HEALTH_KEY_PREFIX
from registry.request import RequestContext
from registry.server.shared_counters import SharedRateLimiter
from registry.service_factory import shared_rate_limit
from storage.composition import prepare_data_dir
from storage.errors import Unauthorized
from storage.memory_registry import MemoryRegistry
from storage.names import RepositoryName
from tests.fakes.asgi_client import AsgiClient
from tests.fakes.plain_client import plain_request
from tests.fakes.server_process import running_server


class CountingLimiter:
    """A fake rate limit. It allows `remaining` more requests, and then tells clients to wait `wait` seconds. `keys` has
    the key of each request."""

    def __init__(self, remaining: int, wait: float) -> None:
        self.remaining = remaining
        self.wait = wait
        self.keys: list[str] = []

    def take(self, key: str) -> float:
        self.keys.append(key)
        self.remaining -= 1
        return 0.0 if self.remaining >= 0 else self.wait


async def test_too_many_requests(registry: MemoryRegistry) -> None:
    """Beyond the limit, every request gets 429 in the format of the spec, with the seconds to wait, rounded up."""
    limiter = CountingLimiter(2, 0.2)
    client = AsgiClient(DistributionAPI(registry, rate_limit=limiter.take))
    assert [(await client("GET", "/v2/")).status for _ in range(2)] == [200, 200]
    for path in ("/v2/", "/v2/a/manifests/b", "/v2/nothing"):
        answer = await client("GET", path)
        assert (answer.status, answer.code, answer["retry-after"]) == (429, "TOOMANYREQUESTS", "1")
    limiter.wait = 12.1
    assert (await client("PUT", "/v2/a/manifests/b"))["retry-after"] == "13"
    assert len(set(limiter.keys)) == 1


class DenyingAuth:
    """An authenticator that refuses every request."""

    async def authenticate(self, request: RequestContext) -> None:
        raise Unauthorized

    def credential_key(self, shown: Sequence[bytes], address: str) -> None:
        return None

    def check_push(self, repo: RepositoryName) -> None:
        raise AssertionError("nobody comes as far")


async def test_refused_requests_count(registry: MemoryRegistry) -> None:
    """Requests with wrong credentials, invalid names or invalid queries count toward the limit as well."""
    limiter = CountingLimiter(3, 1)
    client = AsgiClient(DistributionAPI(registry, rate_limit=limiter.take, authenticator=DenyingAuth()))
    for path, status in (("/v2/", 401), ("/v2/A/tags/list", 400), ("/v2/?n=%", 400), ("/v2/", 429), ("/v2/A/x", 429)):
        assert (await client("GET", path)).status == status
    assert len(limiter.keys) == 5


async def test_requests_count_under_the_address(registry: MemoryRegistry) -> None:
    """Requests count under the client's IP address, or under its 64-bit network for IPv6."""
    limiter = CountingLimiter(10, 1)
    api = DistributionAPI(registry, rate_limit=limiter.take)
    client = AsgiClient(api)
    for address in ("192.0.2.1", "2001:db8::1", "2001:db8::2"):
        client.address = address
        await client("GET", "/v2/")
    assert limiter.keys == ["192.0.2.1", "2001:db8::/64", "2001:db8::/64"]


async def test_requests_for_all_paths_count(tmp_path: Path) -> None:
    """Requests for `/token`, `/api`, pages and paths that do not exist count under the same key as requests for `/v2`
    from the same address. A refusal outside `/v2` has the security headers."""
    prepare_data_dir(tmp_path)
    limiter = CountingLimiter(0, 1.5)
    app = create_app(Settings(data=tmp_path), rate_limit=limiter.take)
    async with app.router.lifespan_context(app):
        transport = httpx2.ASGITransport(app=app, client=("192.0.2.9", 1))
        async with httpx2.AsyncClient(transport=transport, base_url="http://registry.test") as client:
            for method, path in (
                ("GET", "/token?service=entrepot"),
                ("POST", "/token"),
                ("GET", "/api/v1/me"),
                ("POST", "/api/v1/users"),
                ("GET", "/api/openapi.json"),
                ("GET", "/api/docs"),
                ("GET", "/"),
                ("GET", "/nothing"),
                ("GET", "/v2/"),
            ):
                answer = await client.request(method, path)
                assert (answer.status_code, answer.headers["retry-after"]) == (429, "2"), path
                assert answer.json()["errors"][0]["code"] == "TOOMANYREQUESTS"
                assert path == "/v2/" or answer.headers["x-frame-options"] == "DENY"
    assert set(limiter.keys) == {"192.0.2.9"}


async def test_health_checks_have_a_limit_of_their_own(tmp_path: Path, registry: MemoryRegistry) -> None:
    """Health checks count under a key of their own, so other requests from the same address do not use up their limit.
    Their limit does not depend on the settings: it allows more than 100 at once, but fewer than 5000."""
    take = shared_rate_limit(Settings(limits=LimitSettings(requests_per_second=0.001, burst=1)))
    assert take is not None
    transport = httpx2.ASGITransport(app=create_app(Settings(data=tmp_path), registry, rate_limit=take))
    async with httpx2.AsyncClient(transport=transport, base_url="http://registry.test") as client:
        assert [(await client.get("/v2/")).status_code for _ in range(2)] == [200, 429]
        assert {(await client.get("/health/live")).status_code for _ in range(20)} == {200}
        assert 100 < sum(take(f"{HEALTH_KEY_PREFIX}192.0.2.1") == 0.0 for _ in range(5000)) < 5000
        assert take(f"{HEALTH_KEY_PREFIX}192.0.2.2") == 0.0


def test_the_settings_of_the_rate_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without settings, there is no limit. If the rate is set without a burst, the burst is what the rate allows in ten
    seconds, and at least one request."""
    # The clock stands still, so that the rate allows no request beyond the burst.
    monkeypatch.setattr(service_factory, "SharedRateLimiter", partial(SharedRateLimiter, clock=lambda: 0.0))
    assert shared_rate_limit(Settings()) is None
    for per_second, burst in ((2, 20), (0.01, 1)):
        take = shared_rate_limit(Settings(limits=LimitSettings(requests_per_second=per_second)))
        assert take is not None
        assert [take("a") == 0.0 for _ in range(burst + 1)] == [True] * burst + [False]
    take = shared_rate_limit(Settings(limits=LimitSettings(requests_per_second=1, burst=3)))
    assert take is not None
    assert [take("a") == 0.0 for _ in range(4)] == [True] * 3 + [False]


@pytest.mark.slow
def test_two_workers_have_one_limit(tmp_path: Path) -> None:
    """However requests are distributed over the workers, only as many succeed as the limit allows."""
    env = {"ENTREPOT_LIMITS__REQUESTS_PER_SECOND": "0.001", "ENTREPOT_LIMITS__BURST": "20"}
    with running_server(tmp_path, env=env) as server:
        answers = [plain_request("GET", server.url + "/v2/") for _ in range(60)]
        assert [answer.status_code for answer in answers] == [200] * 20 + [429] * 40
        assert int(answers[-1].headers["retry-after"]) > 900  # the rate allows one request in 1000 seconds
        assert plain_request("GET", server.url + "/health/live").status_code == 200
