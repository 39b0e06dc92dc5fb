"""`open_endpoint_client`: opens an HTTP client with which a command checks an endpoint or measures its speed.

An *upstream* is a mirrored registry. Its *endpoints* are the URLs at which clients can reach it. The client uses the
same proxy, certificates and login as a mirror, and stores nothing on the disk.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from math import inf

from registry.config import Upstream
from registry.upstream.client import HttpUpstreamClient
from registry.upstream.destinations import classify_address
from storage.content import Allowance, CorruptionRecord, Manifest, UpstreamCheck
from storage.names import Digest, Reference, RepositoryName


class InMemoryUpstreamRecords:
    """Implements `storage.upstream_records.UpstreamRecords` in memory, for one command. Stores only tokens and
    *allowances* (the states of rate limits). The methods for manifests and blobs store nothing and find nothing.

    `UpstreamRecords` documents the methods. For example:

    - `is_confirmed`, `confirm`: whether it is recorded that the repository at the upstream has the blob.
    - `bad_senders`, `save_bad_senders`, `forget_bad_senders`: the endpoints that sent corrupt bytes for a blob.
      `seconds`: the largest age of these records."""

    def __init__(self) -> None:
        self._tokens: dict[str, tuple[str, float]] = {}
        self._allowances: dict[str, Allowance] = {}

    async def last_check(
        self, repo: RepositoryName, reference: Reference, *, blob: bool = False
    ) -> UpstreamCheck | None:
        return None

    async def save_check(self, repo: RepositoryName, reference: Reference, found: bool, *, blob: bool = False) -> None:
        return None

    async def forget_checks(
        self, repo: RepositoryName, reference: Reference | None = None, *, blob: bool = False
    ) -> None:
        return None

    async def referring_manifests(self, repo: RepositoryName, digest: Digest) -> list[Manifest]:
        return []

    async def find_holder(self, prefix: str, digest: Digest) -> RepositoryName | None:
        return None

    async def is_confirmed(self, repo: RepositoryName, digest: Digest) -> bool:
        return False

    async def confirm(self, repo: RepositoryName, digest: Digest) -> None:
        return None

    async def bad_senders(self, upstream: str, digest: Digest, seconds: float) -> Mapping[str, CorruptionRecord]:
        return {}

    async def save_bad_senders(self, upstream: str, digest: Digest, endpoints: Collection[str], seconds: float) -> None:
        return None

    async def forget_bad_senders(self, upstream: str, digests: Collection[Digest]) -> int:
        return 0

    async def token(self, key: str) -> tuple[str, float] | None:
        return self._tokens.get(key)

    async def save_token(self, key: str, token: str, expires: float) -> None:
        self._tokens[key] = token, expires

    async def delete_token(self, key: str, token: str) -> None:
        if self._tokens.get(key, ("", 0.0))[0] == token:
            del self._tokens[key]

    async def allowance(self, key: str) -> Allowance | None:
        return self._allowances.get(key)

    async def save_allowance(self, key: str, allowance: Allowance) -> None:
        self._allowances[key] = allowance


class NoLeases:
    """Implements `storage.leases.Leases` without locking, for a command that shares nothing with other processes."""

    @asynccontextmanager
    async def take(self, key: str) -> AsyncIterator[bool]:
        yield False  # the caller has not waited for the lease

    @asynccontextmanager
    async def slot(
        self, name: str, count: int, keep_free: int = 0, *, urgent_after: float = inf
    ) -> AsyncIterator[None]:
        yield

    @asynccontextmanager
    async def try_slot(self, name: str, count: int, keep_free: int = 0) -> AsyncIterator[bool]:
        yield True

    def is_any_slot_held(self, name: str, count: int) -> bool:
        return False


@asynccontextmanager
async def open_endpoint_client(
    upstream: Upstream, url: str, clock: Callable[[], float] = time.time
) -> AsyncIterator[tuple[HttpUpstreamClient, InMemoryUpstreamRecords]]:
    """Yields two values: a client that sends all its requests to the endpoint `url` of the upstream, and the records in
    which the client stores tokens and allowances. `clock` returns seconds since 1970."""
    # This handler keeps Python from printing the client's warnings on stderr. The command prints its findings itself.
    logging.getLogger("registry").addHandler(logging.NullHandler())
    records = InMemoryUpstreamRecords()
    settings = upstream.model_copy(update={"endpoints": [url]})
    client = HttpUpstreamClient(settings, records, NoLeases(), clock, classify_address)
    try:
        yield client, records
    finally:
        await client.aclose()
