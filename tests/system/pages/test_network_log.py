"""Tests that the web pages cause no requests to other hosts, with the network log of a real browser."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import urlsplit

from tests.fakes.admin_site import PASSWORD
from tests.fakes.clients.member_site import SiteWithAccounts
from tests.fakes.page_browser import page_browser
from tests.fakes.page_site import MEMBER


def requested_hosts(log: Path) -> set[str]:
    """Returns the hosts of all requests for pages and frames, and of all requests that a page has caused. Requests that
    the browser sends on its own, such as those for updates, have no initiator and are left out."""
    document = json.loads(log.read_text())
    started = document["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    requests = [event["params"] for event in document["events"] if event["type"] == started and "params" in event]
    return {
        urlsplit(request["url"]).netloc
        for request in requests
        if request.get("url")
        and (request["request_type"] in ("main frame", "subframe") or request["initiator"] != "not an origin")
    }


def test_pages_cause_requests_to_the_registry_only(site: SiteWithAccounts, tmp_path: Path) -> None:
    """While a user opens several pages, the browser sends requests to the registry only."""
    log = tmp_path / "net.json"
    with page_browser(f"--log-net-log={log}") as browser, browser.tab(site.server.url) as tab:
        tab.log_in(MEMBER, PASSWORD)
        for path in ("/ui/repositories/public/described", "/ui/setup?client=ci", "/ui/repositories?in=docker.io"):
            tab.open(path)
    assert requested_hosts(log) == {site.server.address}
