"""A registry with hosted and cached repositories and with accounts, for the pages.

`root` is an admin. `alice` may pull crew/** and what is cached. Everyone may pull public/** and zoo/**. The texts of
`public/described` try to be markup. Nothing listens at the endpoint of the upstream, because pages need no upstream.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from storage.activity import HOUR_SECONDS, Activity
from storage.composition import open_registry, prepare_data_dir
from storage.names import RepositoryName
from tests.fakes.admin_site import ADMIN, PASSWORD
from tests.fakes.clients.member_site import MemberSite
from tests.fakes.commands import entrepot_output
from tests.fakes.page_store import add_cached, add_described, add_index
from tests.fakes.registry_content import BY
from tests.fakes.server_process import running_server

MEMBER = "alice"
MANY = 60
"""How many repositories are below `zoo/`: more than a page shows."""
HOSTILE = "<script>document.title='taken'</script><img src=x onerror=alert(1)>"
LINKS = "[link](javascript:alert(1)) ![picture](//evil.example/p.png)"
DESCRIPTION = f"# Described\n\nWhat it is for. {HOSTILE}\n\n{LINKS}"
UPSTREAM = [{"name": "docker.io", "default": True, "endpoints": ["http://127.0.0.1:9"]}]


@dataclass(frozen=True)
class Reader:
    """Somebody who looks at the pages, and repositories that they see and do not see. `name`: None: nobody in
    particular."""

    name: str | None
    sees: tuple[str, ...]
    sees_not: tuple[str, ...]


READERS = {
    "admin": Reader(ADMIN, ("public/app", "crew/app", "secret/app"), ()),
    "member": Reader(MEMBER, ("public/app", "crew/app"), ("secret/app",)),
    "nobody": Reader(None, ("public/app",), ("crew/app", "secret/app")),
}


async def _fill(data: Path) -> None:
    async with open_registry(data) as store:
        for repo in ("public/app", "crew/app", "secret/app", *(f"zoo/{n:02}" for n in range(MANY))):
            await add_cached(store, repo, "1.0", "latest")
        await add_described(store, "public/described", "v1", HOSTILE, label_bytes=1_000_000)
        await add_described(store, "crew/web", "1.4", "production")
        await store.descriptions.put_description(RepositoryName("public/described"), DESCRIPTION, by=BY)
        await add_cached(store, "docker.io/library/ubuntu", "24.04")
        await add_index(store, "docker.io/library/ubuntu", "latest", [("linux", "amd64"), ("linux", "arm64")])
        now = time.time()
        for hour in (*range(24), *range(24, 30 * 24, 24)):
            number = hour * 37 % 91 * (1 if hour < 24 else 24)
            activity = Activity(9 * number, number // 9, 7 * number, number, number * 2**22, number * 2**25)
            await store.activity.add(now - hour * HOUR_SECONDS, activity)
        await store.search_indexer.run()


@contextmanager
def page_site(folder: Path, **variables: str) -> Iterator[MemberSite]:
    """Starts the server of the registry, with its data below `folder`. `variables`: further settings."""
    prepare_data_dir(folder / "data")
    asyncio.run(_fill(folder / "data"))
    entrepot_output("user", "add", ADMIN, "--admin", "--password-file", "-", folder=folder, given=PASSWORD)
    with running_server(folder, workers=2, env={"ENTREPOT_UPSTREAM": json.dumps(UPSTREAM), **variables}) as server:
        site = MemberSite(server, folder)
        site.done("POST", "/users", {"name": MEMBER, "password": PASSWORD})
        site.grant(f"user:{MEMBER}", {"crew/**": "pull,push", "docker.io/**": "pull"})
        site.allow_everyone("public/**")
        site.allow_everyone("zoo/**")
        yield site
