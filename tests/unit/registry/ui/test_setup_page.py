"""The page *Set-up* says whether the registry has received a request of the visitor's client program. Admins can ask
this for another address."""

from __future__ import annotations

from pathlib import Path

from tests.unit.registry.ui.test_pages import site

NOT_SEEN = "No request of this client has come through here from your address, 192.0.2.1"
SEEN = "came through here from your address, 192.0.2.1"


async def test_the_page_shows_requests_from_the_visitors_address(tmp_path: Path) -> None:
    """For each client program, the page says whether a request came from the visitor's address. A request of containerd
    counts for k3s, too. Requests from other addresses are not shown."""
    async with site(tmp_path, accounts=False) as server, server.browser() as browser:
        recent = server.app.app.telemetry.recent_clients
        assert recent is not None
        recent.record({"client": ("192.0.2.2", 1), "headers": [(b"user-agent", b"docker/29")]})
        recent.record({"client": ("192.0.2.1", 1), "headers": [(b"user-agent", b"containerd/v2.3.0")]})
        for client, is_seen in {"docker": False, "ci": False, "containerd": True, "k3s": True, "podman": False}.items():
            page = (await browser.get(f"/ui/setup?client={client}")).text
            assert (SEEN in page, NOT_SEEN in page) == (is_seen, not is_seen), client
            assert "192.0.2.2" not in page
        assert " ago</time>" in (await browser.get("/ui/setup?client=k3s")).text


async def test_only_admins_see_requests_from_other_addresses(tmp_path: Path) -> None:
    """An admin can name another address in the query. For other visitors, the query has no effect."""
    path = "/ui/setup?client=containerd&from=192.0.2.2"
    expected = "came through here from 192.0.2.2"
    async with site(tmp_path) as server, server.browser() as browser:
        recent = server.app.app.telemetry.recent_clients
        assert recent is not None
        recent.record({"client": ("192.0.2.2", 1), "headers": [(b"user-agent", b"containerd/v2.3.0")]})
        for name in (None, "alice"):
            if name is not None:
                await server.log_in(browser, name)
            assert "here from 192.0.2.2" not in (await browser.get(path)).text
        await server.log_in(browser, "root")
        assert expected in (await browser.get(path)).text
        # The same page for 192.0.2.3, which has sent no request.
        assert "has come through here from 192.0.2.3 in" in (await browser.get(f"{path[:-1]}3")).text
        assert 'name="from"' in (await browser.get("/ui/setup")).text
        assert (await browser.get("/ui/setup?from=%3Cscript%3E")).status_code == 400
