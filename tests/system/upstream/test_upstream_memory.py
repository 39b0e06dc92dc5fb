"""Tests that an upstream cannot fill the memory with what a process caches of its responses: tokens, login
requirements, and pauses of token requests."""

from __future__ import annotations

import gc
import json
import tracemalloc
from contextlib import suppress
from urllib.parse import urlsplit

import pytest

from registry.upstream import authorizer, token_client
from registry.upstream.sized_cache import ENTRY_BYTES, SizedCache
from registry.upstream.upstream_responses import parse_count
from storage.errors import RegistryError
from storage.store.stored_registry import StoredRegistry
from tests.fakes.upstream_source import TAG, answer, scripted_server, upstream_source
from tests.system.upstream.conftest import good_repo

REPOSITORIES = 80
"""Number of repositories for which each test sends a request."""
TOKEN_CHARACTERS, PARAMETER_CHARACTERS = 20_000, 3_000
"""Lengths of each token, and of each of the two long parameters of a challenge. The client accepts longer ones, too."""
BYTES = 128 * 1024
"""The limit of each cache in these tests."""


def test_a_cache_is_limited_by_bytes_and_by_entries() -> None:
    """The values that were put first are removed. A value that is replaced counts once. A value that is larger than the
    whole cache is not kept."""
    cache: SizedCache[str, int] = SizedCache(3, 10_000)
    for key in "abca":
        cache.put(key, 1, 100)
    assert cache.size_bytes == 3 * (100 + ENTRY_BYTES)
    cache.put("d", 2, 100)
    assert [cache.get(key) for key in "abcd"] == [1, None, 1, 2]
    cache.put("e", 3, 9_500)
    assert [cache.get(key) for key in "acde"] == [None, None, None, 3]
    cache.put("f", 4, 10_000)
    cache.put("e", 5, 10_000)
    assert [cache.get(key) for key in "ef"] == [None, None]
    assert cache.size_bytes == 0


@pytest.mark.parametrize("cached", ["tokens", "requirements", "pauses"])
async def test_memory_of_what_an_upstream_sends_is_bounded(
    registry: StoredRegistry, monkeypatch: pytest.MonkeyPatch, cached: str
) -> None:
    """An upstream sends a long token for each of many repositories, a challenge with long parameters, or a 429 of a
    token service that has a long URL. The client keeps only a bounded part of them in memory."""
    monkeypatch.setattr(token_client, "MAX_CACHED_TOKEN_BYTES", BYTES)
    monkeypatch.setattr(token_client, "MAX_CACHED_PAUSE_BYTES", BYTES)
    monkeypatch.setattr(authorizer, "MAX_CACHED_REQUIREMENT_BYTES", BYTES)

    def reply(head: str) -> bytes:
        if "/token" in head.split()[1]:
            if cached == "pauses":
                return answer(429, retry_after="600")
            return answer(200, json.dumps({"token": "t" * (TOKEN_CHARACTERS if cached == "tokens" else 10)}))
        if "authorization: bearer" in head.lower():
            return answer(200, "{}")  # which is no manifest, but the token is accepted
        padding = "x" * (1 if cached == "tokens" else PARAMETER_CHARACTERS)
        # The scope begins with the last part of the repository's name, so each repository has another scope.
        scope = f"{head.split('/manifests')[0].rpartition('/')[2]}{padding}"
        return answer(401, www_authenticate=f'Bearer realm="{server.url}/token",service="{padding}",scope="{scope}"')

    async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:

        async def request(numbers: range) -> None:
            for number in numbers:
                with suppress(RegistryError):
                    await source.get_manifest(good_repo(number), TAG)
                server.heads.clear()
            gc.collect()
            for number in range(256):  # replaces the long URLs in the cache of urllib, which keeps the last 128
                urlsplit(f"http://127.0.0.1/{number}")

        await request(range(30))  # fills the cache under test
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            await request(range(30, REPOSITORIES))
            grown = tracemalloc.get_traced_memory()[0] - before
        finally:
            tracemalloc.stop()
    # The cache under test was full before, so it does not grow. The margin is for other memory. A cache without a limit
    # would grow by more than the margin.
    assert grown < 3 * BYTES


@pytest.mark.parametrize(
    ("text", "count"),
    [("0", 0), (" 12 ", 12), ("9" * 18, 10**18 - 1), ("9" * 19, None), ("-1", None), ("\u0661", None), ("", None)],
)
def test_counts_in_headers_fit_into_the_database(text: str, count: int | None) -> None:
    """A size that an upstream states counts only if the database can store it."""
    assert parse_count(text) == count
