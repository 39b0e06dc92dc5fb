"""Which hosts the pages make a browser contact, by the browser's own log of its network."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import urlsplit

from tests.fakes.admin_site import PASSWORD
from tests.fakes.clients.member_site import MemberSite
from tests.fakes.page_browser import page_browser
from tests.fakes.page_site import MEMBER


def hosts_asked(log: Path) -> set[str]:
    """Returns the hosts of all requests for documents, and of all requests that an origin caused. The browser's own
    requests, such as those for updates, have no origin."""
    document = json.loads(log.read_text())
    started = document["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    requests = [event["params"] for event in document["events"] if event["type"] == started and "params" in event]
    return {
        urlsplit(request["url"]).netloc
        for request in requests
        if request.get("url")
        and (request["request_type"] in ("main frame", "subframe") or request["initiator"] != "not an origin")
    }


def test_the_browser_asks_nobody_else(site: MemberSite, tmp_path: Path) -> None:
    """A visit leads to requests to the registry only."""
    log = tmp_path / "net.json"
    with page_browser(f"--log-net-log={log}") as browser, browser.tab(site.server.url) as tab:
        tab.log_in(MEMBER, PASSWORD)
        for path in ("/ui/repositories/public/described", "/ui/setup?client=ci", "/ui/repositories?in=docker.io"):
            tab.open(path)
    assert hosts_asked(log) == {site.server.address}
