"""Searches for images that this registry passes on to the search of an upstream, such as Docker Hub."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from registry.admin.content_searches import STORE_SEARCH_LIMITS, ContentSearches, Searcher
from registry.auth.rights.principal import UNPRIVILEGED, open_principal
from registry.backend import open_backend
from registry.background_work import search_indexer
from registry.config import Settings, Upstream
from registry.upstream import hub_search
from registry.upstream.hub_search import (
    CACHED_SECONDS,
    MAX_CONCURRENT_SEARCHES,
    PAUSE_SECONDS,
    REFUSAL_STATUSES,
    UpstreamSearch,
    open_upstream_search,
)
from storage.composition import prepare_data_dir
from storage.errors import TooManyRequests
from storage.names import RepositoryName, Tag
from storage.patterns import ALL_NAMES
from tests.fakes.loop_hold import MAX_SECONDS, watch_loop
from tests.fakes.registry_content import BY, image_of, push_blob
from tests.fakes.upkeep_store import Clock
from tests.unit.registry.conftest import wait_until


class SearchServer:
    """The search server of an upstream. `answer`: the body of its responses; None: it does not respond. It responds
    only while `gate` is set."""

    def __init__(self) -> None:
        self.answer: bytes | None = json.dumps({"results": [{"name": "nginx", "star_count": 5}]}).encode()
        self.status = 200
        self.requests: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.requests.append(head.split(" ")[1])
            await self.gate.wait()
            if self.answer is None:
                await reader.read()  # until the client gives up
            else:
                length = f"content-length: {len(self.answer)}\r\nconnection: close\r\n\r\n"
                writer.write(f"HTTP/1.1 {self.status} x\r\n{length}".encode() + self.answer)
        except (asyncio.IncompleteReadError, ConnectionError):
            return  # the client has given up
        finally:
            writer.close()


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """No search of a slow machine times out, except where a test shortens the timeout."""
    monkeypatch.setattr(hub_search, "TIMEOUT_SECONDS", 60)


@asynccontextmanager
async def search_setup(clock: Clock) -> AsyncIterator[tuple[SearchServer, UpstreamSearch]]:
    """Runs a fake search server. Yields it, and the search that sends its requests to it."""
    fake = SearchServer()
    server = await asyncio.start_server(fake.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    search = open_upstream_search(Upstream(name="docker.io", endpoints=[url], search=f"{url}/v1/search"), clock)
    try:
        yield fake, search
    finally:
        await search.aclose()
        server.close()
        await server.wait_closed()


async def test_answers_are_cached() -> None:
    """Several searches for the same text, even at the same time, cause one request to the upstream. The results are
    cached for a while."""
    clock = Clock()
    async with search_setup(clock) as (fake, search):
        results_of_searches = await asyncio.gather(*(search.find("nginx & co", 25, 1) for _ in range(5)))
        assert [[each.name for each in results] for results in results_of_searches] == [["nginx"]] * 5
        assert fake.requests == ["/v1/search?q=nginx+%26+co&n=25&page=1"]
        clock.now += CACHED_SECONDS
        await search.find("nginx & co", 25, 1)
        assert len(fake.requests) == 2


async def test_malformed_responses() -> None:
    """Malformed results in a response are ignored. After an error or a malformed response, searches find nothing, and
    no request is sent for a while."""
    clock = Clock()
    async with search_setup(clock) as (fake, search):
        fake.answer = json.dumps(
            {"results": [{"name": 7}, "x", {"name": "a", "description": 1, "star_count": -1}]}
        ).encode()
        [valid_result] = await search.find("odd", 25, 1)
        assert (valid_result.name, valid_result.description, valid_result.stars, valid_result.is_official) == (
            "a",
            "",
            0,
            False,
        )
        for number, (status, answer) in enumerate(((500, b""), (200, b"no JSON"), (200, b"[]"), (200, b"x" * 2**21))):
            fake.status, fake.answer = status, answer
            requests_before = len(fake.requests)
            assert list(await search.find(f"x{number}", 25, 1)) == []
            assert list(await search.find(f"y{number}", 25, 1)) == []
            assert len(fake.requests) == requests_before + 1
            clock.now += PAUSE_SECONDS


@pytest.mark.slow
async def test_an_upstream_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the upstream does not answer, the first search ends after a short timeout. The next searches find nothing at
    once, without a request."""
    async with search_setup(Clock()) as (fake, search):
        assert await search.find("warm up", 25, 1)  # the first request also creates the HTTP client, which takes time
        monkeypatch.setattr(hub_search, "TIMEOUT_SECONDS", 1.0)
        fake.answer = None
        assert list(await search.find("x", 25, 1)) == []
        assert list(await search.find("y", 25, 1)) == []
        # On a slow machine, the first search may time out before its request is sent.
        assert fake.requests[1:] in ([], ["/v1/search?q=x&n=25&page=1"])


async def test_a_refused_search_does_not_affect_other_searches() -> None:
    """If the upstream refuses a search because of its text, other searches are still passed on."""
    async with search_setup(Clock()) as (fake, search):
        for status in REFUSAL_STATUSES:
            fake.status = status
            assert list(await search.find(f"x{status}", 25, 1)) == []
            fake.status = 200
            assert await search.find(f"y{status}", 25, 1)


async def test_too_many_results() -> None:
    """If the upstream sends more results than requested, only the requested number is used. Parsing the response does
    not block the event loop."""
    async with search_setup(Clock()) as (fake, search):
        assert await search.find("warm up", 25, 1)  # the first request also creates the HTTP client
        fake.answer = json.dumps({"results": [{"name": "alpine/x"}] * 29_000}, separators=(",", ":")).encode()
        async with watch_loop() as hold:
            results = await search.find("abc", 25, 1)
        assert len(results) == 25
        assert hold.longest < MAX_SECONDS / 2


async def test_size_of_cached_answers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cached answers together have at most `MAX_CACHED_BYTES`. If they would have more, the oldest are removed."""
    monkeypatch.setattr(hub_search, "MAX_CACHED_BYTES", 64 * 1024)
    async with search_setup(Clock()) as (fake, search):
        result = {"name": "x" * 300, "description": "\N{CJK UNIFIED IDEOGRAPH-4E2D}" * 1000}
        fake.answer = json.dumps({"results": [result] * 25}).encode()
        for text in ("a", "b", "b", "c", "c", "a"):  # an answer has about 25 KiB, so two fit into the cache
            assert len(await search.find(text, 25, 1)) == 25
        assert [path.removeprefix("/v1/search?q=")[0] for path in fake.requests] == ["a", "b", "c", "a"]


async def test_too_many_searches_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """If too many searches run and wait, a further search finds nothing. Later searches are passed on again."""
    monkeypatch.setattr(hub_search, "MAX_WAITING_SEARCHES", 1)
    async with search_setup(Clock()) as (fake, search):
        fake.gate.clear()
        running = [
            asyncio.create_task(search.find(f"x{number}", 25, 1)) for number in range(MAX_CONCURRENT_SEARCHES + 1)
        ]
        while len(fake.requests) < MAX_CONCURRENT_SEARCHES:  # noqa: ASYNC110 - the fake server does not signal it
            await asyncio.sleep(0.01)
        assert list(await search.find("too many", 25, 1)) == []
        fake.gate.set()
        assert all(await asyncio.gather(*running))
        assert await search.find("too many", 25, 1)


async def test_a_timeout_in_the_queue_is_no_failure_of_the_upstream(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a search waits too long while others run, it finds nothing. This does not count as a failure of the upstream,
    so later searches are still passed on."""
    async with search_setup(Clock()) as (fake, search):
        fake.gate.clear()
        running = [asyncio.create_task(search.find(f"x{number}", 25, 1)) for number in range(MAX_CONCURRENT_SEARCHES)]
        while len(fake.requests) < MAX_CONCURRENT_SEARCHES:  # noqa: ASYNC110 - the fake server does not signal it
            await asyncio.sleep(0.01)
        with monkeypatch.context() as patched:
            patched.setattr(hub_search, "TIMEOUT_SECONDS", 0.01)  # the running searches keep the longer timeout
            assert list(await search.find("in vain", 25, 1)) == []
        fake.gate.set()
        assert all(await asyncio.gather(*running))
        assert await search.find("in vain", 25, 1)


async def test_searches_of_one_visitor_do_not_delay_those_of_others(tmp_path: Path) -> None:
    """The anonymous clients of one network run one search at a time. A few further searches wait, and others are
    refused. A search from another network does not wait for these searches."""
    prepare_data_dir(tmp_path)
    finished: list[str] = []
    async with open_backend(Settings(data=tmp_path)) as backend:
        searches = ContentSearches(backend.store, backend.router)

        async def search(address: str) -> None:
            try:
                await searches.find_tags(Searcher(open_principal(), address), "nginx", 0, 25)
            finally:
                finished.append(address)

        most = STORE_SEARCH_LIMITS.max_pending_per_visitor
        running = [asyncio.create_task(search(address)) for address in ["192.0.2.1"] * (most + 3) + ["192.0.2.2"]]
        results = await asyncio.gather(*running, return_exceptions=True)
    assert [isinstance(result, TooManyRequests) for result in results] == [False] * most + [True] * 3 + [False]
    assert finished.index("192.0.2.2") < most


@asynccontextmanager
async def passed_on_searches(folder: Path) -> AsyncIterator[tuple[SearchServer, ContentSearches]]:
    """Runs a registry that passes searches on to an upstream."""
    fake = SearchServer()
    server = await asyncio.start_server(fake.serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    hub = Upstream(name="docker.io", endpoints=[url], search=f"{url}/v1/search", default=True)
    prepare_data_dir(folder)
    async with open_backend(Settings(data=folder, upstream=[hub])) as backend:
        yield fake, ContentSearches(backend.store, backend.router, backend.upstream_search)
    server.close()
    await server.wait_closed()


async def test_disconnected_clients_start_no_further_searches(tmp_path: Path) -> None:
    """A client that disconnects while the upstream searches for it holds its slot until the upstream has answered. A
    search of another visitor is passed on, and a cached answer needs no slot."""
    async with passed_on_searches(tmp_path) as (fake, searches):
        first, other = Searcher(open_principal(), "192.0.2.1"), Searcher(open_principal(), "192.0.2.2")
        assert await searches.search_upstream(first, "cached", 25, 1)
        fake.gate.clear()
        for number in range(30):
            search = asyncio.create_task(searches.search_upstream(first, f"x{number}", 25, 1))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            search.cancel()
            await asyncio.wait([search])
        assert await searches.search_upstream(first, "cached", 25, 1)
        others = asyncio.create_task(searches.search_upstream(other, "other", 25, 1))
        await wait_until(lambda: len(fake.requests) == 3)
        assert sorted(path.partition("&")[0] for path in fake.requests[1:]) == ["/v1/search?q=other", "/v1/search?q=x0"]
        fake.gate.set()
        assert await others


async def test_results_have_the_names_of_this_registry(tmp_path: Path) -> None:
    """Results have the names under which they can be pulled from this registry. Results that the user may not pull are
    left out, and so are invalid names. If the user may pull nothing from the upstream, no request is sent to it."""
    async with passed_on_searches(tmp_path) as (fake, searches):
        upstream_results = [{"name": name} for name in ("nginx", "bitnami/nginx", "No Name", "x" * 300)]
        fake.answer = json.dumps({"results": upstream_results}).encode()
        for principal, names, total_requests in (
            (UNPRIVILEGED, [], 0),
            (open_principal(["docker.io"]), [], 0),
            (open_principal(), ["docker.io/library/nginx", "docker.io/bitnami/nginx"], 1),
        ):
            results = await searches.search_upstream(Searcher(principal, "192.0.2.1"), "nginx", 25, 1)
            assert ([name for name, _ in results], len(fake.requests)) == (names, total_requests)


@pytest.mark.parametrize("is_private", [True, False])
async def test_labels_of_a_private_upstream(tmp_path: Path, is_private: bool) -> None:
    """Labels of an image of a private upstream can be found only after the upstream has confirmed that the image's
    repository has the config. The repository's link to the config is not enough, because any manifest that names the
    digest creates such a link."""
    upstream = Upstream(name="hub.example", endpoints=["http://127.0.0.1:9"], require_grant=is_private)
    settings = Settings(data=tmp_path, upstream=[upstream])
    repo, data = RepositoryName("hub.example/team/app"), b'{"config": {"Labels": {"color": "red"}}}'
    prepare_data_dir(tmp_path)
    async with open_backend(settings) as backend:
        store, indexer = backend.store, search_indexer(settings, backend.store)
        config = await push_blob(store, RepositoryName("hub.example/other/app"), data)
        await store.metadata.put_manifest(repo, image_of(config), [Tag("v1")], BY, True, None)
        await store.mount_blob(repo, config.digest, RepositoryName("hub.example/other/app"), by=BY)

        async def count_found_labels() -> int:
            await indexer.run()
            await indexer.read_incomplete_again()
            return len((await store.search.find_by_labels(["red"], ALL_NAMES, 0, 10)).items)

        assert await count_found_labels() == (0 if is_private else 1)
        await store.records.confirm(repo, config.digest)
        assert await count_found_labels() == 1
