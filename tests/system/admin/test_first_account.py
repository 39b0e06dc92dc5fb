"""Tests of adding the first account over the API, which is possible only from the machine of the registry, and by the
command."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
import pytest

from registry.app import create_app
from registry.config import Settings
from storage.composition import prepare_data_dir
from tests.fakes.admin_site import PASSWORD, code_of
from tests.fakes.commands import entrepot_output
from tests.fakes.plain_client import plain_request
from tests.fakes.server_process import running_server

FIRST_ADMIN = {"name": "root", "password": PASSWORD, "admin": True}


@asynccontextmanager
async def api(folder: Path, address: str = "127.0.0.1", *, proxied: bool = False) -> AsyncIterator[httpx2.AsyncClient]:
    """Yields a client of a new registry, which sees `address` as the address of the client. `proxied`: the settings
    name a proxy."""
    settings = Settings(data=folder / "data", trusted_proxies=["192.0.2.0/24"] if proxied else [])
    prepare_data_dir(settings.data)
    app = create_app(settings)
    async with app.router.lifespan_context(app):
        transport = httpx2.ASGITransport(app, client=(address, 4711))
        async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1:5000/api/v1") as client:
            yield client


def add_root_by_command(folder: Path, **variables: str) -> None:
    """Adds the admin `root` with `entrepot user add`. `variables`: environment variables of the command."""
    flags = ("--admin", "--password-file", "-")
    entrepot_output("user", "add", "root", *flags, folder=folder, stdin_text=PASSWORD, **variables)


async def test_from_this_machine(tmp_path: Path) -> None:
    """A request from the same machine adds the first account, an admin. From then on, requests need a login."""
    async with api(tmp_path) as client:
        me = (await client.get("/me")).json()
        assert (me["name"], me["open"], me["admin"]) == (None, True, True)
        assert (await client.post("/users", json=FIRST_ADMIN)).status_code == 201
        assert (await client.get("/me")).status_code == 401
        assert (await client.post("/users", json={**FIRST_ADMIN, "name": "eve"})).status_code == 401
        assert (await client.get("/users", auth=("root", PASSWORD))).status_code == 200


async def test_first_account_must_be_an_admin(tmp_path: Path) -> None:
    """The first account must be an admin. Other first accounts are refused."""
    async with api(tmp_path) as client:
        for path, body in (("/users", {**FIRST_ADMIN, "admin": False}), ("/robots", {"name": "ci"})):
            refused = await client.post(path, json=body)
            assert (refused.status_code, code_of(refused)) == (400, "ACCOUNT_INVALID")
        assert (await client.get("/me")).json()["open"]


@pytest.mark.parametrize("address", ["192.0.2.7", "2001:db8::7", "10.0.0.1"])
async def test_from_another_machine(tmp_path: Path, address: str) -> None:
    """From another machine, only `/me` succeeds. All other routes are refused, and the error names the command that
    adds the first account."""
    async with api(tmp_path, address) as client:
        me = (await client.get("/me")).json()
        assert (me["open"], me["admin"]) == (True, False)
        for answer in (
            await client.post("/users", json=FIRST_ADMIN),
            await client.get("/users"),
            await client.get("/audit"),
        ):
            assert (answer.status_code, code_of(answer)) == (403, "DENIED")
            assert "entrepot user add NAME --admin" in answer.text
        assert (await client.get("/me")).json()["open"]


async def test_dns_rebinding(tmp_path: Path) -> None:
    """A web page can have a host name that resolves to this machine (DNS rebinding). The browser then treats the
    registry as the page's own site. In a registry without accounts, such a page can neither read nor change anything. A
    program that is not a browser can use such a host name."""
    rebound_page = {"host": "evil.example:5000", "sec-fetch-site": "same-origin", "accept-language": "en"}
    async with api(tmp_path) as client:
        for answer in (
            await client.get("/me", headers=rebound_page),
            await client.get("/repositories/team/app/tags/1/history", headers=rebound_page),
            await client.put(
                "/repositories/team/app/tags/1", json={}, headers={**rebound_page, "origin": "http://evil.example:5000"}
            ),
        ):
            assert (answer.status_code, code_of(answer)) == (403, "DENIED")
        assert (await client.get("/me", headers={"host": "evil.example:5000"})).status_code == 200
        assert (await client.get("/me", headers={**rebound_page, "host": "127.0.0.1:5000"})).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"x-forwarded-for": "192.0.2.7"},
        {"forwarded": "for=192.0.2.7"},
        {"host": "registry.example.com"},
        {"host": "evil.example:5000"},
    ],
)
async def test_proxies_and_other_host_names(tmp_path: Path, headers: dict[str, str]) -> None:
    """A request through a proxy on this machine, or with another host name, does not count as a request from this
    machine."""
    async with api(tmp_path) as client:
        assert (await client.post("/users", json=FIRST_ADMIN, headers=headers)).status_code == 403


async def test_behind_a_proxy(tmp_path: Path) -> None:
    """If the settings name a trusted proxy, the API does not add the first account. Only the command does."""
    async with api(tmp_path, proxied=True) as client:
        assert (await client.post("/users", json=FIRST_ADMIN)).status_code == 403
        assert (await client.get("/me")).json()["open"]
        await asyncio.to_thread(add_root_by_command, tmp_path, ENTREPOT_TRUSTED_PROXIES="192.0.2.0/24")
        assert (await client.get("/me")).status_code == 401
        assert (await client.get("/me", auth=("root", PASSWORD))).json()["admin"]


async def test_the_last_admin_stays(tmp_path: Path) -> None:
    """The last admin cannot be disabled, removed or made an ordinary account. If there is a second admin, the first can
    be removed."""
    async with api(tmp_path) as client:
        await client.post("/users", json=FIRST_ADMIN)
        client.auth = httpx2.BasicAuth("root", PASSWORD)
        for answer in (
            await client.delete("/users/root"),
            await client.patch("/users/root", json={"enabled": False}),
            await client.patch("/users/root", json={"admin": False}),
            await client.patch("/users/root", json={"admin": True, "enabled": False}),
        ):
            assert (answer.status_code, code_of(answer)) == (409, "LAST_ADMIN")
        await client.post("/users", json={**FIRST_ADMIN, "name": "second"})
        changed = await client.patch("/users/second", json={"admin": False, "enabled": False})
        assert (changed.json()["admin"], changed.json()["enabled"]) == (False, False)
        assert (await client.delete("/users/root")).status_code == 409
        await client.patch("/users/second", json={"admin": True, "enabled": True})
        assert (await client.delete("/users/root")).status_code == 204


def test_first_account_by_command_while_a_server_runs(tmp_path: Path) -> None:
    """After `entrepot user add` has added the first account, every worker of a running server requires a login from the
    next request on. After the last account is removed, a login is still required."""
    with running_server(tmp_path, workers=2) as server:
        url = f"{server.url}/api/v1/me"
        assert [plain_request("GET", url).json()["open"] for _ in range(4)] == [True] * 4
        add_root_by_command(tmp_path)
        assert [plain_request("GET", url).status_code for _ in range(8)] == [401] * 8
        assert plain_request("GET", url, auth=("root", PASSWORD)).json()["admin"]
        entrepot_output("user", "disable", "root", "--force", folder=tmp_path)
        assert [plain_request("GET", url, auth=("root", PASSWORD)).status_code for _ in range(8)] == [401] * 8
        entrepot_output("user", "remove", "root", "--force", folder=tmp_path)
        assert plain_request("GET", url).status_code == 401, "a login is required even without accounts"
