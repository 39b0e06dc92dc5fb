"""The whole application. The distribution API serves `/v2`; FastAPI serves all other routes."""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack
from pathlib import Path

import httpx2
import pytest

from registry.app import Entrepot, create_app, reopen_store
from registry.config import Settings
from storage.composition import layout_of, prepare_data_dir
from storage.errors import StorageFull
from storage.memory_registry import MemoryRegistry
from storage.metadata.sqlite.immutable_database import ImmutableDatabase
from storage.wrappers import RefusingRegistry
from tests.fakes.asgi_client import AsgiClient
from tests.unit.registry.conftest import V2, put_image


@pytest.fixture
def app(tmp_path: Path, registry: MemoryRegistry) -> Entrepot:
    return create_app(Settings(data=tmp_path), registry)


def browser(app: Entrepot, *, raises: bool = True) -> httpx2.AsyncClient:
    transport = httpx2.ASGITransport(app=app, raise_app_exceptions=raises)
    return httpx2.AsyncClient(transport=transport, base_url="http://registry.test")


async def test_v2_is_served_by_the_distribution_api(app: Entrepot, registry: MemoryRegistry) -> None:
    """`/v2` and all paths below it are served by the distribution API, also unknown paths. `/v2x` is not. Only the
    distribution API adds the header X-Request-Id."""
    await put_image(registry, "1")
    client = AsgiClient(app)
    for path in ("/v2", "/v2/", f"{V2}/manifests/1"):
        assert (await client("GET", path)).status == 200
    assert "x-request-id" in await client("GET", "/v2/nothing")
    assert "x-request-id" not in await client("GET", "/v2x")


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/nothing", 404), ("GET", "/v2x", 404), ("POST", "/health/live", 405)]
)
async def test_errors_of_fastapi_have_the_format_of_the_spec(
    app: Entrepot, method: str, path: str, status: int
) -> None:
    """The errors 404 and 405 outside `/v2` have the format of the distribution spec. 405 has an Allow header."""
    answer = await AsgiClient(app)(method, path)
    assert (answer.status, answer.code) == (status, "UNSUPPORTED")
    assert ("allow" in answer) == (status == 405)


async def test_invalid_parameters_get_422_in_the_format_of_the_spec(app: Entrepot) -> None:
    """The error for an invalid parameter has the format of the distribution spec, and names the parameter."""

    @app.get("/count")
    async def count(n: int) -> int:
        return n

    answer = await AsgiClient(app)("GET", "/count?n=x")
    assert (answer.status, answer.code) == (422, "UNSUPPORTED")
    assert answer.json["errors"][0]["detail"][0]["where"] == "query.n"


async def test_unexpected_errors_get_500_in_the_format_of_the_spec(app: Entrepot) -> None:
    """The response to an unexpected error has the format of the distribution spec, and no text of the exception."""

    @app.get("/broken")
    async def broken() -> None:
        raise ValueError("secret")

    async with browser(app, raises=False) as client:
        answer = await client.get("/broken")
    assert answer.status_code == 500
    assert answer.json()["errors"][0]["code"] == "UNKNOWN"
    assert "secret" not in answer.text


async def test_health(app: Entrepot, tmp_path: Path) -> None:
    """`/health/live` is OK as long as the process answers. `/health/ready` is OK only if the registry works."""
    async with browser(app) as client:
        assert (await client.get("/health/live")).json() == {"status": "ok"}
        assert (await client.get("/health/ready")).json() == {"status": "ok"}
    async with browser(create_app(Settings(data=tmp_path), RefusingRegistry())) as client:
        assert (await client.get("/health/live")).status_code == 200
        answer = await client.get("/health/ready")
        assert (answer.status_code, answer.json()["status"]) == (503, "failing")


async def test_the_root_page_shows_a_command(app: Entrepot) -> None:
    """The page `/` shows a `docker push` command with the address that the client used."""
    async with browser(app) as client:
        answer = await client.get("/")
    assert "docker push registry.test/team/app" in answer.text


async def test_the_openapi_document_is_served(app: Entrepot) -> None:
    """The OpenAPI document is served. FastAPI's own pages, which load scripts from the internet, are not."""
    async with browser(app) as client:
        assert "/health/ready" in (await client.get("/api/openapi.json")).json()["paths"]
        for path in ("/docs", "/redoc"):
            assert (await client.get(path)).status_code == 404


async def test_settings_reach_the_api(
    tmp_path: Path, registry: MemoryRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    """The settings `read_only`, `delete`, `public_url` and `limits.manifest` take effect, and calls are logged."""
    await put_image(registry, "1")
    app = create_app(Settings(data=tmp_path, delete=False, public_url="https://registry.example.com"), registry)
    client = AsgiClient(app)
    with caplog.at_level(logging.DEBUG, "registry.calls"):
        assert (await client("DELETE", f"{V2}/manifests/1")).status == 405
    assert "operation=delete_tag" in caplog.text
    assert (await client("POST", f"{V2}/blobs/uploads/"))["location"].startswith("https://registry.example.com/v2/")
    app = create_app(Settings.model_validate({"read_only": True, "limits": {"manifest": 4 << 20}}), registry)
    assert (await AsgiClient(app)("POST", f"{V2}/blobs/uploads/")).status == 405
    answer = await AsgiClient(app)("PUT", f"{V2}/manifests/1", {"Content-Length": str((4 << 20) + 1)})
    assert answer.status == 413


async def test_the_application_opens_the_store_itself(tmp_path: Path) -> None:
    """If no registry is passed to `create_app`, the application opens the store in the data directory when it starts,
    and closes it when it ends. Pushed content is available after the next start."""
    prepare_data_dir(tmp_path / "data")
    for status in (404, 200):
        app = create_app(Settings(data=tmp_path / "data"))
        async with app.router.lifespan_context(app):
            client = AsgiClient(app)
            digest = "sha256:2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae"  # of `foo`
            async with browser(app) as visitor:
                assert (await visitor.get("/health/ready")).status_code == 200
            assert (await client("HEAD", f"{V2}/blobs/{digest}")).status == status
            assert (await client("POST", f"{V2}/blobs/uploads/?digest={digest}", body=b"foo")).status == 201


@pytest.mark.slow
async def test_opening_the_store_for_writing_is_retried(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A worker that was started on a full disk has opened the database read-only, and no process can write. The worker
    tries to open the store for writing until it succeeds. Errors other than a full disk do not end the attempts."""
    data = tmp_path / "data"
    prepare_data_dir(data)
    read_only_database = ImmutableDatabase(layout_of(data))
    app = create_app(Settings(data=data))
    (data / "entrepot.db").rename(data / "elsewhere")  # now the store cannot be opened
    async with AsyncExitStack() as stack:
        stack.callback(read_only_database.close)
        first_failure = asyncio.Event()

        def on_log_record(_: logging.LogRecord) -> bool:
            first_failure.set()
            return True

        logging.getLogger("registry").addFilter(on_log_record)
        stack.callback(logging.getLogger("registry").removeFilter, on_log_record)
        reopening = asyncio.create_task(reopen_store(app, stack, read_only_database.retire))
        async with asyncio.timeout(20):
            waiting_for_failure = asyncio.create_task(first_failure.wait())
            await asyncio.wait([reopening, waiting_for_failure], return_when=asyncio.FIRST_COMPLETED)
            waiting_for_failure.cancel()
            assert "cannot be opened again" in caplog.text
            (data / "elsewhere").rename(data / "entrepot.db")
            await reopening
        with pytest.raises(StorageFull):
            read_only_database.connection_at(None)


@pytest.mark.parametrize(
    ("is_replaced", "starts_background_work", "work_starts"), [(0, 1, True), (1, 1, False), (0, 0, False)]
)
async def test_work_of_a_store_that_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_replaced: bool, starts_background_work: bool, work_starts: bool
) -> None:
    """When the store was opened for writing, the background work starts only if the settings of the application are in
    force. It does not start if a reload has replaced the application (`is_replaced`), or if the settings are not in
    force yet (`starts_background_work` is false)."""
    monkeypatch.setattr("registry.app.REOPEN_SECONDS", 0.0)
    prepare_data_dir(tmp_path)
    app = create_app(Settings(data=tmp_path), starts_background_work=bool(starts_background_work))
    app.is_retiring = bool(is_replaced)
    async with AsyncExitStack() as stack:
        await reopen_store(app, stack, lambda: None)
        assert app.work is not None
        assert app.work._is_started is work_starts
