"""The interface of the records that the mirror stores about its *upstreams*, the registries that it caches
(`UpstreamRecords`)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final, Protocol

from storage.content import Allowance, CorruptionRecord, Manifest, UpstreamCheck
from storage.names import Digest, Reference, RepositoryName

MAX_PAUSE_SECONDS: Final = 3600.0
"""Longest time for which the mirror sends no requests after a 429 of an upstream, even if the upstream asks for a
longer pause. So if a stored pause ends even further in the future, the clock was set back after the pause was
stored."""
CLOCK_TOLERANCE_SECONDS: Final = 1.0
"""A record that lies more than this many seconds in the future was stored before the clock was set back."""


class UpstreamRecords(Protocol):
    """The mirror's records about its upstreams. All processes share the records, which survive restarts of the server.
    A power cut may lose recent changes, except changes by `confirm`; the mirror then requests the lost information from
    the upstream again. Changes raise StorageFull, StorageFailed.

    A *check* is a request that asked an upstream whether it has a manifest or blob. An *endpoint* is one server of an
    upstream, named by its URL. *Corrupt* bytes are bytes that an endpoint sent for a blob, but that do not have the
    blob's digest."""

    async def last_check(
        self, repo: RepositoryName, reference: Reference, *, blob: bool = False
    ) -> UpstreamCheck | None:
        """Returns the last check of the manifest `reference`, or, with `blob=True`, of the blob with the digest
        `reference`. Returns None if no such check is stored. Checks of manifests and blobs are separate, because a
        client can request a manifest by the digest of a blob."""
        ...

    async def save_check(self, repo: RepositoryName, reference: Reference, found: bool, *, blob: bool = False) -> None:
        """Stores a check that was made now. `found`: whether the upstream has the manifest or, with `blob=True`, the
        blob."""
        ...

    async def forget_checks(
        self, repo: RepositoryName, reference: Reference | None = None, *, blob: bool = False
    ) -> None:
        """Deletes the check of the manifest `reference` or, with `blob=True`, of the blob `reference`. If `reference`
        is None, deletes all checks of manifests and blobs in `repo`."""
        ...

    async def referring_manifests(self, repo: RepositoryName, digest: Digest) -> list[Manifest]:
        """Returns the newest manifests of `repo` that have the blob as config or layer, newest first. Returns at most 8
        and may leave out large manifests."""
        ...

    async def find_holder(self, prefix: str, digest: Digest) -> RepositoryName | None:
        """Returns the name of a repository in this registry that has the blob and whose name begins with `prefix`; None
        if there is none. `prefix` must end with a slash."""
        ...

    async def is_confirmed(self, repo: RepositoryName, digest: Digest) -> bool:
        """Returns whether it is recorded that the upstream's repository has the blob. A download of the blob for `repo`
        records this, and so does `confirm`. Returns False if `repo` does not have the blob in this registry."""
        ...

    async def confirm(self, repo: RepositoryName, digest: Digest) -> None:
        """Stores that the upstream's repository has the blob. Does nothing if `repo` does not have the blob in this
        registry."""
        ...

    async def bad_senders(self, upstream: str, digest: Digest, seconds: float) -> Mapping[str, CorruptionRecord]:
        """Returns the endpoints of the upstream that sent corrupt bytes for the blob within the last `seconds` seconds.
        Maps the URL of each endpoint to its record."""
        ...

    async def save_bad_senders(self, upstream: str, digest: Digest, endpoints: Collection[str], seconds: float) -> None:
        """Stores that each of the endpoints (URLs) sent corrupt bytes for the blob one more time. Deletes all records
        of corrupt bytes, for any blob, that are older than `seconds` seconds."""
        ...

    async def forget_bad_senders(self, upstream: str, digests: Collection[Digest]) -> int:
        """Deletes the upstream's records of corrupt bytes for these blobs. Returns how many of the blobs had such
        records."""
        ...

    async def token(self, key: str) -> tuple[str, float] | None:
        """Returns the bearer token that is stored under `key`, and the time at which it expires (seconds since 1970).
        The mirror sends such a token to an upstream. It chooses a key for each endpoint, scope and login. Returns None
        if no token is stored or the stored one has expired."""
        ...

    async def save_token(self, key: str, token: str, expires: float) -> None:
        """Stores under `key` a bearer token that an upstream has issued. `expires`: time at which the token expires, in
        seconds since 1970."""
        ...

    async def delete_token(self, key: str, token: str) -> None:
        """Deletes `token`, which the upstream has refused, if it is still the token stored under `key`."""
        ...

    async def allowance(self, upstream: str) -> Allowance | None:
        """Returns the stored state of a rate limit; None if no state is stored. `upstream`: the name of the upstream;
        for a rate limit on one endpoint and one kind of request, a key that stands for these two."""
        ...

    async def save_allowance(self, upstream: str, allowance: Allowance) -> None:
        """Stores the state of a rate limit. If a state is stored already, combines the two. Takes `remaining` and
        `limit` from the state that the upstream reported later (`at`). Takes the later end of the pause (`until`). Does
        not use a stored `at` in the future, nor a stored `until` more than `MAX_PAUSE_SECONDS` from now: they were
        stored before the clock was set back."""
        ...
