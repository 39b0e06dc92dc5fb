"""A registry with hosted and cached repositories, and a browser."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from storage.composition import open_registry, prepare_data_dir
from tests.fakes.admin_site import ADMIN, PASSWORD
from tests.fakes.clients.member_site import MemberSite
from tests.fakes.commands import entrepot_output
from tests.fakes.page_browser import PageBrowser, page_browser
from tests.fakes.page_store import add_cached, add_index
from tests.fakes.server_process import running_server

MEMBER = "alice"
MANY = 60
"""How many repositories are below `zoo/`: more than a page shows."""
UPSTREAM = [{"name": "docker.io", "default": True, "endpoints": ["http://127.0.0.1:9"]}]
"""Nothing listens there: pages need no upstream."""


async def _fill(data: Path) -> None:
    async with open_registry(data) as store:
        for repo in ("public/app", "crew/app", "secret/app", *(f"zoo/{n:02}" for n in range(MANY))):
            await add_cached(store, repo, "1.0", "latest")
        await add_cached(store, "docker.io/library/ubuntu", "24.04")
        await add_index(store, "docker.io/library/ubuntu", "latest", [("linux", "amd64"), ("linux", "arm64")])


@pytest.fixture(scope="package")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MemberSite]:
    """The admin root; alice, who may pull crew/** and what is cached; and everyone, who may pull public/** and
    zoo/**."""
    folder = tmp_path_factory.mktemp("pages")
    prepare_data_dir(folder / "data")
    asyncio.run(_fill(folder / "data"))
    entrepot_output("user", "add", ADMIN, "--admin", "--password-file", "-", folder=folder, given=PASSWORD)
    variables = {"ENTREPOT_UPSTREAM": json.dumps(UPSTREAM)}
    with running_server(folder, workers=2, env=variables) as server:
        site = MemberSite(server, folder)
        site.done("POST", "/users", {"name": MEMBER, "password": PASSWORD})
        site.grant(f"user:{MEMBER}", {"crew/**": "pull,push", "docker.io/**": "pull"})
        site.allow_everyone("public/**")
        site.allow_everyone("zoo/**")
        yield site


@pytest.fixture(scope="module")
def browser() -> Iterator[PageBrowser]:
    """Ends with the module, because other tests need an event loop of their own."""
    with page_browser() as started:
        yield started


@dataclass(frozen=True)
class Reader:
    """Somebody who looks at the pages. `name`: None: nobody in particular."""

    name: str | None
    sees: tuple[str, ...]
    sees_not: tuple[str, ...]


READERS = {
    "admin": Reader(ADMIN, ("public/app", "crew/app", "secret/app"), ()),
    "member": Reader(MEMBER, ("public/app", "crew/app"), ("secret/app",)),
    "nobody": Reader(None, ("public/app",), ("crew/app", "secret/app")),
}
