"""The interface of the records that the mirror stores about its *upstreams*, the registries that it caches
(`UpstreamRecords`)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final, Protocol

from storage.content import Allowance, CorruptionRecord, Manifest, UpstreamCheck
from storage.names import Digest, Reference, RepositoryName

MAX_PAUSE_SECONDS: Final = 3600.0
"""Longest time for which the mirror sends no requests to an upstream that has answered 429. The upstream may ask for a
longer time. If a stored pause ends more than this many seconds from now, it was stored before the clock was set back,
and counts as no pause."""
CLOCK_TOLERANCE_SECONDS: Final = 1.0
"""If the time of a record is more than this many seconds in the future, the record was stored before the clock was set
back."""


class UpstreamRecords(Protocol):
    """The mirror's records about its upstreams. All processes share the records, and the records survive restarts of
    the server. A power cut may lose recent changes, except those by `confirm`. Methods that change records raise
    StorageFull, StorageFailed.

    A *check* is a request that asked an upstream whether it has a manifest or blob. An *endpoint* is one server of an
    upstream, named by its URL. Bytes that an endpoint sent for a blob are *corrupt* if they do not have the blob's
    digest."""

    async def last_check(
        self, repo: RepositoryName, reference: Reference, *, blob: bool = False
    ) -> UpstreamCheck | None:
        """Returns the last check of the manifest `reference`, or, with `blob=True`, of the blob with the digest
        `reference`. Returns None if no such check is stored. A manifest and a blob with the same digest have
        separate checks."""
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
        manifests, and may leave out large manifests."""
        ...

    async def find_holder(self, prefix: str, digest: Digest) -> RepositoryName | None:
        """Returns the name of a repository in this registry that has the blob and whose name begins with `prefix`.
        Returns None if there is no such repository. `prefix` must end with a slash."""
        ...

    async def is_confirmed(self, repo: RepositoryName, digest: Digest) -> bool:
        """Returns whether it is recorded that the repository at the upstream has the blob. A download of the blob for
        `repo` records this, and so does `confirm`. Returns False if `repo` does not have the blob in this registry."""
        ...

    async def confirm(self, repo: RepositoryName, digest: Digest) -> None:
        """Records that the repository at the upstream has the blob. Does nothing if `repo` does not have the blob in
        this registry."""
        ...

    async def bad_senders(self, upstream: str, digest: Digest, seconds: float) -> Mapping[str, CorruptionRecord]:
        """Returns the endpoints of the upstream that sent corrupt bytes for the blob within the last `seconds` seconds.
        Maps the URL of each endpoint to its record."""
        ...

    async def save_bad_senders(self, upstream: str, digest: Digest, endpoints: Collection[str], seconds: float) -> None:
        """Adds one to the number of times that each of the endpoints (URLs) sent corrupt bytes for the blob. Deletes
        all records of corrupt bytes that are older than `seconds` seconds, whatever their blob."""
        ...

    async def forget_bad_senders(self, upstream: str, digests: Collection[Digest]) -> int:
        """Deletes the upstream's records of corrupt bytes for these blobs. Returns how many of the blobs had such
        records."""
        ...

    async def token(self, key: str) -> tuple[str, float] | None:
        """Returns the bearer token that is stored under `key`, and the time at which it expires (seconds since 1970).
        Returns None if no token is stored or the stored token has expired. `key` stands for one combination of
        endpoint, scope and login."""
        ...

    async def save_token(self, key: str, token: str, expires: float) -> None:
        """Stores under `key` a bearer token that an upstream has issued. `expires`: time at which the token expires, in
        seconds since 1970."""
        ...

    async def delete_token(self, key: str, token: str) -> None:
        """Deletes `token`, which the upstream has refused. Does nothing if another token is stored under `key` now."""
        ...

    async def allowance(self, key: str) -> Allowance | None:
        """Returns the stored state of a rate limit; None if no state is stored. If the limit is for a whole upstream,
        `key` is the name of the upstream. If the limit is for one endpoint and one kind of request, `key` names
        both."""
        ...

    async def save_allowance(self, key: str, allowance: Allowance) -> None:
        """Stores the state of a rate limit. `key`: see `allowance`. If a state is stored already, combines the two
        states:

        - `at`, `remaining` and `limit` come from the state with the later `at`. A stored `at` in the future counts as
          earlier.
        - `until` is the later `until`. A stored `until` more than `MAX_PAUSE_SECONDS` from now counts as no pause."""
        ...
