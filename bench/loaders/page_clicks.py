"""Simulates people who use the web UI, run as a program:
`python -m bench.loaders.page_clicks PORT SECONDS REPOSITORIES`.

Eight browsers repeat the same clicks. Each opens the overview, searches for a repository with a request for each typed
character, opens the repository, opens one of its tags, and goes back to the list. A browser sends the requests of a
real browser in the same order: the page, then the files that are not in its cache, then the parts that the page's
scripts load. Each browser has an IP address of its own, because the registry limits requests for pages by address. The
report has the latencies of whole pages.
"""

from __future__ import annotations

import random
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from urllib.parse import quote

from bench.growth.synthetic_store import TAGS_PER_REPOSITORY, repository_name
from bench.loaders.http_client import HttpClient
from bench.loaders.load_report import LoadReport, print_report, run_loader

BROWSERS = 8
PAUSE_SECONDS = 0.2
"""Seconds from a complete page to the next click. People click more slowly."""
PAGE_HEADERS = {"Accept": "text/html", "Accept-Language": "en", "Sec-Fetch-Site": "same-origin"}
PART_HEADERS = {**PAGE_HEADERS, "HX-Request": "true"}
_FILE_LINK = re.compile(r'(?:href|src)="(/ui/static/[^"]+)"')
_IMPORT = re.compile(r'from "\./([^"]+)"')


def run_page_clicks(port: int, seconds: float, repositories: int) -> LoadReport:
    """Runs this module as a program, and returns its report. `repositories`: the number of repositories in the store.
    Raises TrialFailed."""
    command = [sys.executable, "-m", "bench.loaders.page_clicks", str(port), str(seconds), str(repositories)]
    return run_loader(command, seconds)


class _Browser:
    """A browser whose cache is empty at first. `times`: the seconds that each page took, including its files and
    parts."""

    def __init__(self, client: HttpClient) -> None:
        self.times: list[float] = []
        self.received = 0
        self._client = client
        self._files: set[str] = set()

    def open(self, path: str, *parts: str) -> None:
        """Loads a page, the files that it links, and then `parts`. Raises TrialFailed."""
        begun = time.perf_counter()
        for file in _FILE_LINK.findall(self._get(path, PAGE_HEADERS).decode()):
            self._load(file)
        for part in parts:
            self._get(part, PART_HEADERS)
        self.times.append(time.perf_counter() - begun)

    def _load(self, file: str) -> None:
        """Loads a file and, if it is a script, the files that it imports. Skips files that the browser has cached."""
        if file not in self._files:
            self._files.add(file)
            content = self._get(file, {}).decode()
            for name in _IMPORT.findall(content) if file.endswith(".js") else ():
                self._load(f"{file.rpartition('/')[0]}/{name}")

    def _get(self, path: str, headers: dict[str, str]) -> bytes:
        body = self._client.request("GET", path, headers=headers, expect=200).body
        self.received += len(body)
        return body


def _clicks(repositories: int, rng: random.Random) -> Iterator[tuple[str, ...]]:
    """Yields the path of a page and the paths of its parts for each click. Never ends."""
    while True:
        name, tag = repository_name(rng.randrange(repositories)), rng.randrange(TAGS_PER_REPOSITORY)
        searches = [f"/ui/search?q={quote(name[:length], safe='')}" for length in range(3, len(name) + 1)]
        yield "/ui/overview", "/ui/overview/now"
        yield "/ui/search", *searches
        yield (f"/ui/repositories/{name}",)
        yield (f"/ui/repositories/{name}:t{tag}",)
        yield "/ui/repositories", f"/ui/repositories?q={quote(name[:4], safe='')}"


def _click(port: int, seconds: float, repositories: int, number: int) -> _Browser:
    """Opens pages in the browser with this number, with pauses, until `seconds` have passed. Returns the browser."""
    rng, ends = random.Random(number), time.perf_counter() + seconds
    with HttpClient(port, f"127.0.1.{number + 1}") as client:
        browser = _Browser(client)
        time.sleep(PAUSE_SECONDS * number / BROWSERS)  # people do not click at the same moment
        for path, *parts in _clicks(repositories, rng):
            browser.open(path, *parts)
            if time.perf_counter() >= ends:
                return browser
            time.sleep(PAUSE_SECONDS)
    raise AssertionError("there is always another click")


def click(port: int, seconds: float, repositories: int) -> None:
    """Runs all browsers for `seconds`, and prints the report. Raises TrialFailed."""
    begun = time.perf_counter()
    with ThreadPoolExecutor(BROWSERS) as threads:
        browsers = list(threads.map(partial(_click, port, seconds, repositories), range(BROWSERS)))
    times = [seconds for browser in browsers for seconds in browser.times]
    print_report(times, sum(browser.received for browser in browsers), time.perf_counter() - begun)


if __name__ == "__main__":
    click(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
