"""Whom the browser asks, by its own log of its network."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import urlsplit

from tests.fakes.admin_site import PASSWORD
from tests.fakes.clients.member_site import MemberSite
from tests.fakes.page_browser import page_browser
from tests.system.pages.conftest import MEMBER


def test_the_browser_asks_nobody_else(site: MemberSite, tmp_path: Path) -> None:
    """A visit leads to requests to the registry alone."""
    log = tmp_path / "net.json"
    with page_browser(f"--log-net-log={log}") as browser, browser.tab(site.server.url) as tab:
        tab.log_in(MEMBER, PASSWORD)
        for path in ("/ui/repositories/crew/app", "/ui/setup?client=ci", "/ui/repositories?in=docker.io"):
            tab.open(path)
    document = json.loads(log.read_text())
    started = document["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    urls = {
        event["params"]["url"]
        for event in document["events"]
        if event["type"] == started and "params" in event and "url" in event["params"]
    }
    asked = {urlsplit(url).netloc for url in urls if urlsplit(url).scheme in ("http", "https", "ws", "wss")}
    assert asked == {site.server.address}
