"""The health checks `/readyz` and `/livez`: whether a server process can serve requests, and the reason if it
cannot."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import httpx2
import pytest
from pydantic import ByteSize

from registry.app import Entrepot, create_app
from registry.config import Settings
from registry.config.upkeep_settings import DiskSettings
from registry.status.readiness import Readiness, write_problem
from registry.status.worker_report import INSTANCE_HEADER, ServerRun
from storage.composition import layout_of, open_registry, prepare_data_dir
from storage.content import Page
from storage.memory_registry import MemoryRegistry
from storage.names import RepositoryName
from tests.fakes.second_connection import second_connection


def visitor(app: Entrepot) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://registry.test")


async def test_a_started_server_is_ready(tmp_path: Path) -> None:
    """A started server is ready, and `/readyz` lists its checks. `/livez` has the id of this run of the server."""
    prepare_data_dir(tmp_path / "data")
    app = create_app(Settings(data=tmp_path / "data"), server_run=ServerRun("one", 1.0))
    async with app.router.lifespan_context(app), visitor(app) as client:
        answer = await client.get("/readyz")
        assert answer.status_code == 200
        assert answer.json() == {
            "status": "ok",
            "read_only": False,
            "checks": [{"name": name, "status": "ok"} for name in ("database", "migrations", "disk")],
        }
        answer = await client.get("/livez")
        assert (answer.json(), answer.headers[INSTANCE_HEADER]) == ({"status": "ok"}, "one")


async def test_failed_checks_have_a_reason(tmp_path: Path) -> None:
    """If the disk has too little free space, or if the database has another schema version, the check of `/readyz`
    fails with a reason. A probe may exclude a check. `/health/ready` does not fail because of the disk."""
    prepare_data_dir(tmp_path / "data")
    app = create_app(Settings(data=tmp_path / "data", disk=DiskSettings(min_free=ByteSize(1 << 60))))
    async with app.router.lifespan_context(app), visitor(app) as client:
        answer = await client.get("/readyz")
        assert answer.status_code == 503
        reasons = {check["name"]: check.get("reason", "") for check in answer.json()["checks"]}
        assert "the disk is almost full" in reasons["disk"]
        assert (reasons["database"], reasons["migrations"]) == ("", "")
        assert (await client.get("/readyz?exclude=disk")).status_code == 200
        assert (await client.get("/health/ready")).status_code == 200
        connection = second_connection(layout_of(tmp_path / "data").metadata)
        connection.pragma("user_version", 999)
        connection.close()
        answer = await client.get("/readyz?exclude=disk")
        assert answer.status_code == 503
        assert "newer Entrepot" in answer.json()["checks"][1]["reason"]


async def test_an_application_without_a_store(tmp_path: Path, registry: MemoryRegistry) -> None:
    """Without a data directory, only the registry itself is checked."""
    async with visitor(create_app(Settings(data=tmp_path), registry)) as client:
        assert [check["name"] for check in (await client.get("/readyz")).json()["checks"]] == ["database"]


async def test_a_check_that_hangs_fails() -> None:
    """If the database does not answer, the check fails after its time limit. While the first query hangs, no second
    query is started."""
    queries, release = 0, asyncio.Event()

    class HangingRegistry(MemoryRegistry):
        async def repositories(self, *_: object, **__: object) -> Page[RepositoryName]:
            nonlocal queries
            queries += 1
            await release.wait()
            return Page([])

    readiness = Readiness(HangingRegistry(), seconds=0.01)
    for _ in range(2):
        (result,) = await readiness.check()
        assert "hangs" in (result.reason or "")
    assert queries == 1
    release.set()
    while (await readiness.check())[0].reason is not None:
        pass


def test_a_directory_without_write_access() -> None:
    """If no file can be written to the directory, the reason names the directory and has the system's error."""
    assert "cannot write to /proc" in (write_problem(Path("/proc")) or "")


@pytest.mark.parametrize("path", ["/livez", "/readyz"])
async def test_probes_count_as_health_checks(tmp_path: Path, registry: MemoryRegistry, path: str) -> None:
    """Requests to `/livez` and `/readyz` count for the rate limit of health checks."""
    keys: list[str] = []

    def count(key: str) -> float:
        keys.append(key)
        return 0.0

    async with visitor(create_app(Settings(data=tmp_path), registry, rate_limit=count)) as client:
        await client.get(path)
    assert keys[0].startswith("health ")


async def test_a_replaced_data_directory_is_not_ready(tmp_path: Path) -> None:
    """If an operator moves the data directory away and puts another one in its place, `/readyz` says that the server
    has to be restarted: it would store pushes in the old database, and their blobs in the new directory."""
    prepare_data_dir(tmp_path / "data")
    app = create_app(Settings(data=tmp_path / "data"))
    async with app.router.lifespan_context(app), visitor(app) as client:
        (tmp_path / "data").rename(tmp_path / "old")
        prepare_data_dir(tmp_path / "data")
        answer = await client.get("/readyz")
        assert answer.status_code == 503
        [reason] = [check["reason"] for check in answer.json()["checks"] if check["name"] == "disk"]
        assert "was moved away or replaced while this process used it; restart the server" in reason


async def test_a_data_directory_that_was_replaced_before_the_checks_were_made_is_not_ready(tmp_path: Path) -> None:
    """`/readyz` compares the directory at the path with the one that the store has open, and not with the one that was
    there when the checks were made."""
    data = tmp_path / "data"
    prepare_data_dir(data)
    async with open_registry(data) as store:
        data.rename(tmp_path / "old")
        prepare_data_dir(data)
        [reason] = [result.reason for result in await Readiness(store, store, data).check() if result.name == "disk"]
        assert reason is not None
        assert "was moved away or replaced while this process used it; restart the server" in reason


async def test_a_deleted_database_is_not_ready(tmp_path: Path) -> None:
    """If the database of a running server is deleted, `/readyz` does not advise a restart: the files that the server
    has open are the only ones with the metadata. It says where they are. With the database back, it is ready again."""
    data = tmp_path / "data"
    prepare_data_dir(data)
    app = create_app(Settings(data=data))
    async with app.router.lifespan_context(app), visitor(app) as client:
        (data / "entrepot.db").rename(tmp_path / "entrepot.db")
        answer = await client.get("/readyz")
        assert answer.status_code == 503
        [reason] = [check["reason"] for check in answer.json()["checks"] if check["name"] == "disk"]
        assert "entrepot.db was deleted or moved away while this process used it; do not stop the server" in reason
        assert "restart" not in reason
        assert f"/proc/{os.getpid()}/fd" in reason
        (tmp_path / "entrepot.db").rename(data / "entrepot.db")
        assert (await client.get("/readyz")).status_code == 200
