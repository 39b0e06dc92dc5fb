"""What the mirror stores about its upstreams (`UpstreamRecords`)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

from storage.content import Allowance, BadSender, Manifest, UpstreamCheck
from storage.names import Digest, Reference, RepositoryName


class UpstreamRecords(Protocol):
    """Shared by all processes and kept over restarts. Only `confirm` is durable: a power cut may lose the rest, and the
    mirror asks its upstream again. Changes raise StorageFull, StorageFailed."""

    async def check(self, repo: RepositoryName, reference: Reference, *, blob: bool = False) -> UpstreamCheck | None:
        """Returns when the upstream was last asked about a manifest, or about the `blob` with that digest, and whether
        it had it. Clients choose references, so a manifest's check never stands for a blob's."""
        ...

    async def note_check(self, repo: RepositoryName, reference: Reference, known: bool, *, blob: bool = False) -> None:
        """Stores a check made now."""
        ...

    async def forget_checks(
        self, repo: RepositoryName, reference: Reference | None = None, *, blob: bool = False
    ) -> None:
        """Deletes the check of `reference`, or all checks in `repo`."""
        ...

    async def referring_manifests(self, repo: RepositoryName, digest: Digest) -> list[Manifest]:
        """Returns the manifests of `repo` that name the blob as config or layer, newest first, at most 8."""
        ...

    async def find_holder(self, prefix: str, digest: Digest) -> RepositoryName | None:
        """Returns a repository that has the blob and whose name begins with `prefix`, which ends with a '/'."""
        ...

    async def confirmed(self, repo: RepositoryName, digest: Digest) -> bool:
        """Returns whether the upstream itself says that the repository has the blob: its bytes were fetched for this
        repository, or `confirm` was called. False also if the repository does not have the blob here."""
        ...

    async def confirm(self, repo: RepositoryName, digest: Digest) -> None:
        """Stores that the upstream says that the repository has the blob. Does nothing if it does not have it here."""
        ...

    async def bad_senders(self, upstream: str, digest: Digest, seconds: float) -> Mapping[str, BadSender]:
        """Returns the endpoints that sent wrong bytes for the blob within the last so many seconds."""
        ...

    async def note_bad_senders(self, upstream: str, digest: Digest, endpoints: Collection[str], seconds: float) -> None:
        """Stores that the endpoints sent wrong bytes once more. Deletes records older than so many seconds."""
        ...

    async def forget_bad_senders(self, upstream: str, digests: Collection[Digest]) -> int:
        """Deletes the records of wrong bytes for these blobs, and returns for how many of them there were any."""
        ...

    async def token(self, key: str) -> tuple[str, float] | None:
        """Returns a stored token and when it expires (seconds since 1970); None if there is none that is valid."""
        ...

    async def keep_token(self, key: str, token: str, expires: float) -> None:
        """Stores a token."""
        ...

    async def drop_token(self, key: str, token: str) -> None:
        """Deletes the token, which the upstream refused. Another token stored meanwhile stays."""
        ...

    async def allowance(self, upstream: str) -> Allowance | None:
        """Returns the stored rate limit. `upstream` may also name one kind of request at one endpoint: those have
        limits of their own."""
        ...

    async def note_allowance(self, upstream: str, allowance: Allowance) -> None:
        """Stores a rate limit: the newest number of requests that are left, and the latest `until`."""
        ...
