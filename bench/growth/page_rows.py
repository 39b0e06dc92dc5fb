"""Rows of the benchmark `growth` that measure the web UI: the time of each page, and the latency of manifest requests
with and without browsers that use the pages. Each row is measured on stores of several sizes."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from urllib.parse import quote

from bench.errors import TrialFailed
from bench.growth.growth_rows import PAGE_TRIALS, GrowthTrial
from bench.growth.synthetic_store import repository_name
from bench.loaders.http_client import HttpClient
from bench.loaders.load_report import LoadReport
from bench.loaders.page_clicks import BROWSERS, run_page_clicks
from bench.loaders.steady_manifests import RATE as STEADY_RATE
from bench.loaders.steady_manifests import run_steady_manifests
from bench.report.measurements import P50, P99, Figure, Sample
from bench.runner import Row

LEAD_SECONDS = 1.0
"""Seconds for which the browsers click before the first manifest is requested, and again after the last one."""
PAGES = Figure("pages", "pages/s meanwhile")
"""The rate at which the browsers load pages while manifests are requested."""
PAGE_P50 = Figure("page_p50", "p50 ms of a page with all its parts")
"""The median time of a page with the files that it links and the parts that its scripts load."""
FROM_ELSEWHERE = {"Via": "1.1 proxy"}
"""A header that marks a request as forwarded by a proxy. While a registry has no accounts, it shows the pages of admins
only to requests that come directly from its own machine."""


def _overview_pages(trial: GrowthTrial, *, key: str, headers: Mapping[str, str], text: str) -> Sample:
    """Returns the median time for the overview page, under the name `key`. `text`: a part of the expected page."""
    return {key: _time_pages(trial, ["/ui/overview"] * PAGE_TRIALS, [text] * PAGE_TRIALS, headers)}


def _repository_pages(trial: GrowthTrial) -> Sample:
    """Returns the median time for the page with the list of repositories. The requests alternate between the list of
    all repositories and the list of those whose names begin with `r/0`. Each page must have a link to repository 0."""
    paths = ["/ui/repositories", "/ui/repositories?q=r%2F0"] * (PAGE_TRIALS // 2)
    return {"repository_page": _time_pages(trial, paths, [_link(repository_name(0))] * len(paths))}


def _search_pages(trial: GrowthTrial) -> Sample:
    """Returns the median time for the page with search results. Every second request searches for `r/0`, which nearly
    every repository name contains. Its page must have a link to repository 0. The other requests search for a whole
    name, chosen at random. Their pages must have a link to the repository with this name."""
    rng, count = random.Random(trial.round), trial.store.size.repositories
    names = [repository_name(rng.randrange(count) if number % 2 else 0) for number in range(PAGE_TRIALS)]
    paths = [f"/ui/search?q={quote(name if number % 2 else 'r/0', safe='')}" for number, name in enumerate(names)]
    return {"search_page": _time_pages(trial, paths, list(map(_link, names)))}


def _link(repository: str) -> str:
    return f'href="/ui/repositories/{repository}"'


def _time_pages(
    trial: GrowthTrial, paths: Sequence[str], texts: Sequence[str], headers: Mapping[str, str] | None = None
) -> float:
    """Requests each path and returns the median time in milliseconds. Raises TrialFailed if a page does not contain
    the text at the same position in `texts`."""
    times = []
    with HttpClient(trial.server.port) as client:
        for path, text in zip(paths, texts, strict=True):
            begun = time.perf_counter()
            answer = client.request("GET", path, headers=headers, expect=200)
            times.append((time.perf_counter() - begun) * 1000)
            if text.encode() not in answer.body:
                raise TrialFailed(f"{path} does not have {text}")
    return statistics.median(times)


def _steady_manifests(trial: GrowthTrial) -> LoadReport:
    return run_steady_manifests(trial.server.port, trial.seconds, trial.store.size.repositories)


def _manifests_alone(trial: GrowthTrial) -> Sample:
    """Measures the latency of manifest requests while nobody uses the web UI."""
    report = _steady_manifests(trial)
    return {P99.key: report.p99, P50.key: report.p50}


def _manifests_beside_pages(trial: GrowthTrial) -> Sample:
    """Measures the latency of manifest requests while browsers use the web UI, and the rate and latency of the
    pages."""
    seconds = trial.seconds + 2 * LEAD_SECONDS
    with ThreadPoolExecutor(1) as background:
        clicking = background.submit(run_page_clicks, trial.server.port, seconds, trial.store.size.repositories)
        time.sleep(LEAD_SECONDS)
        report = _steady_manifests(trial)
        pages = clicking.result()
    return {P99.key: report.p99, P50.key: report.p50, PAGES.key: pages.rate, PAGE_P50.key: pages.p50}


def _page_row(name: str, title: str, measure: Callable[[GrowthTrial], Sample]) -> Row[GrowthTrial]:
    """Returns a row for the time of one page, which `measure` returns for one trial. `peer_rounds=0` in the row means
    that docker-registry cannot be measured: it has no web UI."""
    return Row(name, title, (Figure(name, "ms"),), measure, peer_rounds=0)


def page_rows() -> list[Row[GrowthTrial]]:
    """Returns the rows, in the order in which they are measured. In a title, "all over" means that the requested
    manifests are spread over all repositories of the store, and "of others" means that the visitor is no admin. Rows
    with pages have `peer_rounds=0` (see `_page_row`)."""
    overview = partial(_overview_pages, key="overview", headers={}, text='id="now"')
    overview_of_non_admin = partial(
        _overview_pages, key="overview_others", headers=FROM_ELSEWHERE, text='class="facts"'
    )
    steady = f"manifest by tag, all over, {STEADY_RATE} requests/s"
    beside = f"the same beside {BROWSERS} browsers that click"
    return [
        _page_row("overview", "page Overview, of an admin", overview),
        _page_row("overview_others", "page Overview, of others", overview_of_non_admin),
        _page_row("search_page", "page Search", _search_pages),
        _page_row("repository_page", "page Repositories", _repository_pages),
        Row("manifest_steady", steady, (P99, P50), _manifests_alone),
        Row("manifest_beside_pages", beside, (P99, P50, PAGES, PAGE_P50), _manifests_beside_pages, peer_rounds=0),
    ]
