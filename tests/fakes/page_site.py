"""Runs a registry for tests of the web UI. It has pushed repositories, cached repositories, and accounts.

`root` is an admin. `alice` is in the group `crew`. She may pull and push crew/**, and pull docker.io/**, the cached
repositories. `ci` is a robot with an API token. Everyone may pull public/** and zoo/**. The texts of `public/described`
contain HTML, which the pages must not interpret. The images in `public/tools` are stored with all their blobs, so that
a deleted tag can be restored. No server listens at the endpoint of the upstream, because the pages need no upstream.
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
from storage.names import RepositoryName, Tag
from tests.fakes.admin_site import ADMIN, PASSWORD
from tests.fakes.clients.member_site import SiteWithAccounts
from tests.fakes.commands import entrepot_output
from tests.fakes.page_store import add_cached, add_described, add_image, add_index
from tests.fakes.registry_content import BY
from tests.fakes.server_process import running_server

MEMBER = "alice"
MANY = 60
"""Number of repositories below `zoo/`. It is more than one page shows."""
HOSTILE = "<script>document.title='taken'</script><img src=x onerror=alert(1)>"
LINKS = "[link](javascript:alert(1)) ![picture](//evil.example/p.png)"
DESCRIPTION = f"# Described\n\nWhat it is for. {HOSTILE}\n\n{LINKS}"
UPSTREAM = [{"name": "docker.io", "default": True, "endpoints": ["http://127.0.0.1:9"]}]
RETENTION = [{"repositories": ["crew/*"], "keep_tags": ["*"]}]
QUOTA = [{"prefix": "crew/", "max_size": 2**30, "max_tags": 100}]


@dataclass(frozen=True)
class PageVisitor:
    """A person who uses the web UI. `name`: the account with which the person logs in; None: no login. `sees`: some
    repositories that the pages show to this person. `sees_not`: some that they do not show."""

    name: str | None
    sees: tuple[str, ...]
    sees_not: tuple[str, ...]


VISITORS = {
    "admin": PageVisitor(ADMIN, ("public/app", "crew/app", "secret/app"), ()),
    "member": PageVisitor(MEMBER, ("public/app", "crew/app"), ("secret/app",)),
    "nobody": PageVisitor(None, ("public/app",), ("crew/app", "secret/app")),
}


async def _fill(data: Path) -> None:
    async with open_registry(data) as store:
        for repo in ("public/app", "crew/app", "secret/app", *(f"zoo/{n:02}" for n in range(MANY))):
            await add_cached(store, repo, "1.0", "latest")
        await add_described(store, "public/described", "v1", HOSTILE, label_bytes=1_000_000)
        await add_described(store, "crew/web", "1.4", "production")
        for tag, layer in (("1", b"1"), ("2", b"2"), ("3", b"3"), ("1", b"newer")):
            await add_image(store, "public/tools", tag, [b"base" * 1000, layer * 1000], Env=[f"TAG={tag}"])
        await store.descriptions.put_description(RepositoryName("public/described"), DESCRIPTION, by=BY)
        ubuntu = RepositoryName("docker.io/library/ubuntu")
        cached = await add_cached(store, ubuntu, "24.04", "lts")
        await store.upstream_tags.freeze(ubuntu, Tag("lts"), cached.digest, by=BY)
        await add_index(store, "docker.io/library/ubuntu", "latest", [("linux", "amd64"), ("linux", "arm64")])
        now = time.time()
        for hour in (*range(24), *range(24, 30 * 24, 24)):
            # Differs from record to record. A record that is older than a day stands for a whole day.
            number = hour * 37 % 91 * (1 if hour < 24 else 24)
            activity = Activity(
                pulls=9 * number,
                pushes=number // 9,
                hits=7 * number,
                misses=number,
                fetched_bytes=number * 2**22,
                saved_bytes=number * 2**25,
            )
            await store.activity.add(now - hour * HOUR_SECONDS, activity)
        await store.search_indexer.run()


@contextmanager
def page_site(folder: Path, **variables: str) -> Iterator[SiteWithAccounts]:
    """Runs the registry with its data below `folder` until the block ends. `variables`: further settings, as
    environment variables."""
    prepare_data_dir(folder / "data")
    asyncio.run(_fill(folder / "data"))
    entrepot_output("user", "add", ADMIN, "--admin", "--password-file", "-", folder=folder, stdin_text=PASSWORD)
    lists = {"UPSTREAM": UPSTREAM, "RETENTION": RETENTION, "QUOTA": QUOTA}
    env = {f"ENTREPOT_{name}": json.dumps(value) for name, value in lists.items()}
    with running_server(folder, workers=2, env={**env, **variables}) as server:
        site = SiteWithAccounts(server, folder)
        site.call_ok("POST", "/users", {"name": MEMBER, "password": PASSWORD})
        site.grant(f"user:{MEMBER}", {"crew/**": "pull,push", "docker.io/**": "pull"})
        site.call_ok("POST", "/groups", {"name": "crew"})
        site.call_ok("PUT", f"/groups/crew/members/{MEMBER}")
        site.grant("group:crew", {"crew/app": "delete"})
        site.call_ok("POST", "/robots", {"name": "ci", "note": "builds"})
        site.call_ok("POST", "/tokens", {"account": "ci", "note": "main branch", "expires_in": "90d"})
        site.allow_everyone("public/**")
        site.allow_everyone("zoo/**")
        yield site
