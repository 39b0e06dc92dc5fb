"""The interface of what a mirror stores about its upstream registries (`UpstreamRecords`)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

from storage.content import Allowance, CorruptionRecord, Manifest, UpstreamCheck
from storage.names import Digest, Reference, RepositoryName


class UpstreamRecords(Protocol):
    """Records of requests to upstreams, which all processes share and which survive restarts.

    A *check* is a request that asked an upstream whether it has a manifest or blob. Only the records of `confirm` also
    survive a power cut; the mirror can get all others again from the upstream. Changes raise StorageFull,
    StorageFailed."""

    async def last_check(
        self, repo: RepositoryName, reference: Reference, *, blob: bool = False
    ) -> UpstreamCheck | None:
        """Returns the last check of the manifest `reference`, or, with `blob`, of the blob with the digest `reference`.
        Returns None if there was none. Checks of manifests and blobs are kept apart, because a client can request a
        manifest by the digest of a blob."""
        ...

    async def save_check(self, repo: RepositoryName, reference: Reference, found: bool, *, blob: bool = False) -> None:
        """Stores a check that was made now. `found`: whether the upstream has the manifest or, with `blob`, the
        blob."""
        ...

    async def forget_checks(
        self, repo: RepositoryName, reference: Reference | None = None, *, blob: bool = False
    ) -> None:
        """Deletes the check of the manifest or, with `blob`, of the blob `reference`. None: of all references in
        `repo`."""
        ...

    async def referring_manifests(self, repo: RepositoryName, digest: Digest) -> list[Manifest]:
        """Returns at most 8 manifests of `repo` that have the blob as config or layer, newest first."""
        ...

    async def find_holder(self, prefix: str, digest: Digest) -> RepositoryName | None:
        """Returns the name of a repository that has the blob here and whose name begins with `prefix`; None if there is
        none. `prefix` ends with a slash."""
        ...

    async def is_confirmed(self, repo: RepositoryName, digest: Digest) -> bool:
        """Returns whether the upstream has confirmed that its repository has the blob: the blob was downloaded for
        `repo`, or `confirm` was called. Returns False if `repo` does not have the blob in this store."""
        ...

    async def confirm(self, repo: RepositoryName, digest: Digest) -> None:
        """Stores that the upstream has confirmed that its repository has the blob. Does nothing if `repo` does not have
        the blob in this store."""
        ...

    async def bad_senders(self, upstream: str, digest: Digest, seconds: float) -> Mapping[str, CorruptionRecord]:
        """Returns, by URL, the endpoints of the upstream that sent corrupt bytes for the blob within the last `seconds`
        seconds."""
        ...

    async def save_bad_senders(self, upstream: str, digest: Digest, endpoints: Collection[str], seconds: float) -> None:
        """Stores that each of the endpoints has sent corrupt bytes for the blob once more. Deletes such records that
        are older than `seconds` seconds."""
        ...

    async def forget_bad_senders(self, upstream: str, digests: Collection[Digest]) -> int:
        """Deletes the records of corrupt bytes for these blobs. Returns the number of the blobs that had such
        records."""
        ...

    async def token(self, key: str) -> tuple[str, float] | None:
        """Returns the bearer token stored under `key`, and the time at which it expires (seconds since 1970). Returns
        None if no valid token is stored."""
        ...

    async def save_token(self, key: str, token: str, expires: float) -> None:
        """Stores a bearer token under `key`. `expires`: seconds since 1970."""
        ...

    async def delete_token(self, key: str, token: str) -> None:
        """Deletes `token`, which an upstream refused. Keeps another token that was stored under `key` meanwhile."""
        ...

    async def allowance(self, upstream: str) -> Allowance | None:
        """Returns the stored state of a rate limit; None if nothing is stored. `upstream`: name of the upstream, or a
        key for one kind of request at one endpoint, if that has a rate limit of its own."""
        ...

    async def save_allowance(self, upstream: str, allowance: Allowance) -> None:
        """Stores the state of a rate limit. If processes store different states, the newest number of remaining
        requests and the latest `until` win."""
        ...
