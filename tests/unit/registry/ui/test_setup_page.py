"""The page *Set-up*: whether the visitor's own client has been here."""

from __future__ import annotations

from pathlib import Path

from tests.unit.registry.ui.test_pages import site

NOT_SEEN = "No request of this client has come through here from your address, 192.0.2.1"
SEEN = "came through here from your address, 192.0.2.1"


async def test_whether_the_client_was_here(tmp_path: Path) -> None:
    """A request of k3s counts for containerd. Requests from other networks are not shown."""
    async with site(tmp_path, accounts=False) as here, here.browser() as browser:
        recent = here.app.app.telemetry.recent_clients
        assert recent is not None
        recent.note({"client": ("192.0.2.2", 1), "headers": [(b"user-agent", b"docker/29")]})
        recent.note({"client": ("192.0.2.1", 1), "headers": [(b"user-agent", b"containerd/v2.3.0")]})
        for client, is_seen in {"docker": False, "ci": False, "containerd": True, "k3s": True, "podman": False}.items():
            page = (await browser.get(f"/ui/setup?client={client}")).text
            assert (SEEN in page, NOT_SEEN in page) == (is_seen, not is_seen), client
            assert "192.0.2.2" not in page
        assert " ago</time>" in (await browser.get("/ui/setup?client=k3s")).text
