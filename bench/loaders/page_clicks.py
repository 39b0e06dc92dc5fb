"""People who click through the pages, run as a program:
`python -m bench.loaders.page_clicks PORT SECONDS REPOSITORIES`.

Eight browsers open the overview, search for a repository while they type its name, open it, open one of its tags, and
go back to the list, again and again. Each asks for what a real browser asks for, in the same order: a page, then the
files that it has not got yet, then the parts that the page's scripts load. It has an address of its own, as the limits
of pages count by address. The report has the latencies of whole pages.
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
"""From a complete page to the next click: faster than people are."""
PAGE_HEADERS = {"Accept": "text/html", "Accept-Language": "en", "Sec-Fetch-Site": "same-origin"}
PART_HEADERS = {**PAGE_HEADERS, "HX-Request": "true"}
_FILE_LINK = re.compile(r'(?:href|src)="(/ui/static/[^"]+)"')
_IMPORT = re.compile(r'from "\./([^"]+)"')


def run_page_clicks(port: int, seconds: float, repositories: int) -> LoadReport:
    """Runs this module as a program. `repositories`: how many the store has. Raises TrialFailed."""
    command = [sys.executable, "-m", "bench.loaders.page_clicks", str(port), str(seconds), str(repositories)]
    return run_loader(command, seconds)


class _Browser:
    """A browser with an empty cache. `times`: the seconds that each page took, with its files and parts."""

    def __init__(self, client: HttpClient) -> None:
        self.times: list[float] = []
        self.received = 0
        self._client = client
        self._files: set[str] = set()

    def open(self, path: str, *parts: str) -> None:
        """Loads a page, its files, and then these parts. Raises TrialFailed."""
        begun = time.perf_counter()
        for file in _FILE_LINK.findall(self._get(path, PAGE_HEADERS).decode()):
            self._load(file)
        for part in parts:
            self._get(part, PART_HEADERS)
        self.times.append(time.perf_counter() - begun)

    def _load(self, file: str) -> None:
        """Loads a file that the browser has not got yet, and what a script imports."""
        if file not in self._files:
            self._files.add(file)
            content = self._get(file, {}).decode()
            for name in _IMPORT.findall(content) if file.endswith(".js") else ():
                self._load(f"{file.rpartition('/')[0]}/{name}")

    def _get(self, path: str, headers: dict[str, str]) -> bytes:
        body = self._client.request("GET", path, headers=headers, expect=200).body
        self.received += len(body)
        return body


def _clicks(repositories: int, chance: random.Random) -> Iterator[tuple[str, ...]]:
    """Yields a page and its parts for each click, for ever."""
    while True:
        name, tag = repository_name(chance.randrange(repositories)), chance.randrange(TAGS_PER_REPOSITORY)
        typed = [f"/ui/search?q={quote(name[:length], safe='')}" for length in range(3, len(name) + 1)]
        yield "/ui/overview", "/ui/overview/now"
        yield "/ui/search", *typed
        yield (f"/ui/repositories/{name}",)
        yield (f"/ui/repositories/{name}:t{tag}",)
        yield "/ui/repositories", f"/ui/repositories?q={quote(name[:4], safe='')}"


def _click(port: int, seconds: float, repositories: int, number: int) -> _Browser:
    chance, ends = random.Random(number), time.perf_counter() + seconds
    with HttpClient(port, f"127.0.1.{number + 1}") as client:
        browser = _Browser(client)
        time.sleep(PAUSE_SECONDS * number / BROWSERS)  # people do not click at the same moment
        for path, *parts in _clicks(repositories, chance):
            browser.open(path, *parts)
            if time.perf_counter() >= ends:
                return browser
            time.sleep(PAUSE_SECONDS)
    raise AssertionError("there is always another click")


def click(port: int, seconds: float, repositories: int) -> None:
    """Clicks for that time, and prints the report. Raises TrialFailed."""
    begun = time.perf_counter()
    with ThreadPoolExecutor(BROWSERS) as threads:
        browsers = list(threads.map(partial(_click, port, seconds, repositories), range(BROWSERS)))
    times = [seconds for browser in browsers for seconds in browser.times]
    print_report(times, sum(browser.received for browser in browsers), time.perf_counter() - begun)


if __name__ == "__main__":
    click(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
