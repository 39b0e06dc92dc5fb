"""The objects that all fills of one mirror share (`FillContext`). A *fill* is the work of one process to get a blob
from the upstream."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from registry.memory_budget import MemoryBudget
from registry.mirror.entitlement import BlobEntitlement
from registry.mirror.fill.retry import STALL_TIMEOUT_SECONDS, BadSenders
from registry.mirror.fill.slots import ConnectionSlots
from registry.mirror.freshness import NegativeCache
from registry.mirror.observer import UNOBSERVED, MirrorObserver
from registry.mirror.upstream_client import UpstreamClient
from storage.names import RepositoryName
from storage.partials import Partials

MAX_CLAIMS: Final = 16
"""Largest number of fills of one upstream that claim a partial blob at the same time in one process. A *partial blob*
is an unfinished download, with a record of the bytes that have arrived. To *claim* a partial blob means to open its
files (`Partials.claim`). If the partial blob has no owner yet, the fill becomes the owner and downloads the blob.
Otherwise the fill waits while the owner, in another process, downloads the blob.

The number equals the number of threads that open files, because further fills would only wait for a thread. Further
fills wait for a permit instead (`FillContext.claim_permits`). If all clients of a fill leave during this wait, the fill
ends without a claim."""


@dataclass(frozen=True)
class FillContext:
    """The objects that all fills of one mirror share.

    - `partials`: the store of the partial blobs.
    - `slots`: limits the connections to the upstream.
    - `entitlement`: decides through which repositories a blob may be read.
    - `negative_cache`: says which blobs the upstream does not have.
    - `bad_senders`: says which endpoints (base URLs) of the upstream sent corrupt bytes for a blob.
    - `to_upstream_name`: returns the name that a repository has at the upstream.
    - `pass_through_memory`: the worker's budget for blobs that are sent to clients without being stored.
    - `stall_timeout`: seconds without progress after which a download fails, if the upstream has begun to send the blob
      (`RetryPolicy`).
    - `observer`: counts the fills.
    - `claim_permits`: a fill holds one of these `MAX_CLAIMS` permits while it claims a partial blob."""

    upstream: UpstreamClient
    partials: Partials
    slots: ConnectionSlots
    entitlement: BlobEntitlement
    negative_cache: NegativeCache
    bad_senders: BadSenders
    to_upstream_name: Callable[[RepositoryName], RepositoryName]
    pass_through_memory: MemoryBudget
    stall_timeout: float = STALL_TIMEOUT_SECONDS
    observer: MirrorObserver = UNOBSERVED
    claim_permits: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MAX_CLAIMS))
