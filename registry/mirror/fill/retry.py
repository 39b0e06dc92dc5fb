"""Retries of a blob's download: how long to wait and when to give up (`RetryPolicy`), which repository of the upstream
to ask (`RepositoryChoice`), and which endpoints to avoid because they sent corrupt bytes (`BadSenders`).

An *endpoint* is one of the base URLs of an upstream registry. A *fill* is the work of one process to get one blob. If
several processes have a fill for the same blob, one fill downloads the blob. The fills of the other processes are its
*followers*, which wait for the bytes. `encode_failure` and `decode_failure` pass the error of a fill to its followers.
"""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Final

from registry.mirror.upstream_client import UpstreamClient
from storage.content import CorruptionRecord
from storage.errors import (
    RegistryError,
    StorageFailed,
    StorageFull,
    TooManyRequests,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from storage.names import Digest, RepositoryName
from storage.upstream_records import CLOCK_TOLERANCE_SECONDS, UpstreamRecords

STALL_TIMEOUT_SECONDS: Final = 45.0
"""Time without progress after which a download fails, once the upstream has begun to send the blob. Before the first
byte, `MAX_ATTEMPTS_BEFORE_FIRST_BYTE` applies instead. The timeout is longer than the restart of an upstream, and
longer than the first pauses of the circuit breaker."""
MIN_PROGRESS_BYTES: Final = 64 * 1024
"""A download makes progress if it has received at least this number of bytes since the last failure."""
FIRST_PAUSE_SECONDS: Final = 0.1
"""Pause before the first retry. Each further pause is twice as long as the pause before it."""
LONGEST_PAUSE_SECONDS: Final = 2.0
"""Longest pause before a retry, unless a TooManyRequests error asks for a longer one."""
MAX_ATTEMPTS_BEFORE_FIRST_BYTE: Final = 2
"""Largest number of attempts before the first byte arrives. The number is small, because a client that has received
no byte can still try another registry."""


class RetryPolicy:
    """Decides when one blob's download is retried, and when it fails. Times are seconds of any monotonic clock."""

    def __init__(self, stall_timeout: float = STALL_TIMEOUT_SECONDS) -> None:
        """`stall_timeout`: in seconds (`STALL_TIMEOUT_SECONDS`)."""
        self.resume_at = 0.0
        """Earliest time at which a request should be sent."""
        self._stall_timeout = stall_timeout
        self._failures_in_row = 0
        """Number of failures since the last progress."""
        self._first_failure_at = 0.0
        """Time of the first failure since the last progress."""
        self._received_at_last_failure = 0
        """Number of bytes that had been received at the last failure."""

    def should_retry(self, error: RegistryError, now: float, received_bytes: int, *, has_response: bool) -> bool:
        """Records a failed request, or a request that was not sent because of a rate limit or an open circuit breaker.
        Returns True if the download should be retried, and sets `resume_at` to the time of the retry. Returns False if
        the download should fail. `received_bytes`: number of bytes received so far. `has_response`: whether the
        upstream has begun to send the blob."""
        if received_bytes - self._received_at_last_failure >= MIN_PROGRESS_BYTES or not self._failures_in_row:
            self._failures_in_row, self._first_failure_at = 0, now
        self._received_at_last_failure = received_bytes
        pause = FIRST_PAUSE_SECONDS * 2 ** min(self._failures_in_row, 10)  # at most 102.4 s
        self._failures_in_row += 1
        if has_response:
            # A short stall timeout makes the longest pause shorter, so that there is time for several attempts.
            pause = min(pause, LONGEST_PAUSE_SECONDS, max(self._stall_timeout / 20, FIRST_PAUSE_SECONDS))
        if isinstance(error, TooManyRequests):
            pause = max(pause, float(error.retry_after))
        self.resume_at = now + pause
        if has_response:
            return self.resume_at <= self._first_failure_at + self._stall_timeout
        # There is no second attempt after a timeout, because the client has already waited for the whole time limit.
        max_attempts = 1 if isinstance(error, UpstreamTimeout) else MAX_ATTEMPTS_BEFORE_FIRST_BYTE
        return self._failures_in_row < max_attempts and pause <= LONGEST_PAUSE_SECONDS

    @property
    def failures_in_row(self) -> int:
        """Number of failures since the last progress."""
        return self._failures_in_row

    def resume_soon(self, now: float) -> None:
        """Allows another attempt after the shortest pause. Call this method if the next attempt differs from the failed
        one, for example because it requests no byte range."""
        self.resume_at = now + FIRST_PAUSE_SECONDS


FAILURES_TO_LEAVE_REPOSITORY: Final = 2
"""Number of failures in a row after which a download continues with another repository. One failure does not suffice,
because a connection can break by chance."""


class RepositoryChoice:
    """Chooses `next_repo`: the repository of the upstream from which an interrupted download requests the missing bytes
    of the blob.

    - If requests to the repository that has sent bytes fail, another usable repository is asked. A repository is
      *usable* until the upstream refuses to send the blob for it.
    - If requests to any other repository fail, the repository that has sent bytes is asked again if it is usable;
      otherwise, another usable repository is asked.
    - If only one repository is usable, it is asked again after each failure.
    - If no repository is usable, the repository that has sent bytes is asked again."""

    def __init__(self, first: RepositoryName, list_repos: Callable[[], Sequence[RepositoryName]]) -> None:
        """`first`: the repository of the first request. `list_repos`: returns the repositories that may be asked, in
        alphabetical order."""
        self.next_repo = first
        self._list_repos = list_repos
        self._sender = first
        """The repository that has sent bytes most recently; `first` if none has."""
        self._last_substitute = first
        """The repository that `_choose_another` chose when it last chose a repository other than `_sender`; `first` if
        it has always chosen `_sender`. `_choose_another` continues behind this repository in alphabetical order, so
        that each repository gets its turn."""
        self._refusing: set[RepositoryName] = set()
        """The repositories for which the upstream has refused to send the blob."""
        self._failures_in_row = 0
        """Number of failures in a row of requests to `next_repo`, since `_choose_another` was last called."""

    @property
    def has_usable_repo(self) -> bool:
        """Whether at least one repository is usable."""
        return bool(self._usable_repos())

    def on_bytes(self, repo: RepositoryName) -> None:
        """Records that bytes have arrived in response to a request to `repo`."""
        self._sender = repo

    def on_refusal(self, repo: RepositoryName) -> None:
        """Records that a request to `repo` has failed with BlobUnknown or Denied: the upstream refuses to send the
        blob for `repo`."""
        self._refusing.add(repo)
        if repo == self.next_repo:
            self._choose_another()

    def on_failure(self, repo: RepositoryName, *, has_progress: bool) -> None:
        """Records that a request to `repo` has failed with another error. Does nothing if `repo` is no longer
        `next_repo`. `has_progress`: whether bytes have arrived since the previous failure."""
        if repo != self.next_repo:
            return
        self._failures_in_row = 1 if has_progress else self._failures_in_row + 1
        if self._failures_in_row >= FAILURES_TO_LEAVE_REPOSITORY:
            self._choose_another()

    def _choose_another(self) -> None:
        """Chooses the next `next_repo`. The *candidates* are the usable repositories except the present `next_repo`.

        - If `_sender` is a candidate, chooses `_sender`.
        - If there are only other candidates, chooses the first candidate after `_last_substitute` in alphabetical
          order. If there is none after it, chooses the first candidate.
        - If there are no candidates, keeps the present `next_repo` if it is usable; otherwise, chooses `_sender`."""
        self._failures_in_row = 0
        usable = self._usable_repos()
        others = [repo for repo in usable if repo != self.next_repo]
        if self._sender in others or not usable:
            self.next_repo = self._sender
        elif others:
            self.next_repo = next((repo for repo in others if repo > self._last_substitute), others[0])
            self._last_substitute = self.next_repo

    def _usable_repos(self) -> list[RepositoryName]:
        """Returns the usable repositories in alphabetical order."""
        return [repo for repo in self._list_repos() if repo not in self._refusing]


_TIMEOUT_KIND: Final = "late"
"""The value of `kind` for an UpstreamTimeout in the JSON of `encode_failure`. For other errors, `kind` is their
`code`."""


def encode_failure(repo: RepositoryName, error: RegistryError) -> str | None:
    """Returns the error of a fill as JSON, for the fill's followers. Returns None if a follower should try the download
    itself, because it might succeed. `repo`: the repository from which the fill has requested the blob."""
    if not isinstance(error, UpstreamUnavailable | TooManyRequests):
        return None
    kind = _TIMEOUT_KIND if isinstance(error, UpstreamTimeout) else error.code
    return json.dumps({"repository": repo, "kind": kind, "message": error.message, "wait": error.retry_after})


def decode_failure(repo: RepositoryName, encoded: str) -> RegistryError | None:
    """Returns the error that `encode_failure` has encoded as `encoded`. Returns None if `encoded` is about another
    repository than `repo`, or cannot be decoded."""
    try:
        record = json.loads(encoded)
        if record["repository"] != repo:
            return None
        kind, message, wait = record["kind"], str(record["message"]), record["wait"]
    except (ValueError, TypeError, LookupError):
        return None
    if kind == TooManyRequests.code:
        return TooManyRequests(message, retry_after=int(wait))
    error_class = UpstreamTimeout if kind == _TIMEOUT_KIND else UpstreamUnavailable
    return error_class(message, retry_after=wait)


log = logging.getLogger("registry.mirror")

LONGEST_SENDER_PAUSE_SECONDS: Final = 30.0
"""Longest pause that `sender_pause` returns."""
FORGET_SENDER_SECONDS: Final = 600.0
"""Time after which the record that an endpoint sent corrupt bytes is deleted."""
MAX_UNSAVED_BLOBS: Final = 1_000
"""Largest number of blobs whose records of corrupt bytes a process keeps in memory, because storing the records failed.
These records take less than 1 MiB."""


def sender_pause(times: int) -> float:
    """Returns for how many seconds an endpoint that has sent corrupt bytes for a blob is not asked for this blob.
    `times`: how often the endpoint has sent corrupt bytes for the blob. The pause is 0 after the first time, because
    bytes can be damaged in transit; then 2, 4, 8 and so on, up to `LONGEST_SENDER_PAUSE_SECONDS`."""
    return 0.0 if times < 2 else min(2.0 ** (times - 1), LONGEST_SENDER_PAUSE_SECONDS)


@dataclass(frozen=True, slots=True)
class AvoidedEndpoints:
    """The endpoints of an upstream that one download avoids.

    - `ask_last`: the endpoints that are asked only if no other endpoint has the blob.
    - `untrusted`: the endpoints whose bytes the download does not accept, with one error for each. They are asked after
      all other endpoints, to find out whether the upstream has the blob. If an untrusted endpoint has the blob, its
      error is raised. If it does not have the blob, its answer "not found" counts like that of any other endpoint."""

    ask_last: frozenset[str] = frozenset()
    untrusted: Mapping[str, UpstreamUnavailable] = field(default_factory=dict)


class BadSenders:
    """Records, for all processes, which endpoints of one upstream sent *corrupt bytes* for a blob: bytes that do not
    have the blob's digest. If a record cannot be stored, for example on a full disk, only this process remembers the
    record."""

    def __init__(self, records: UpstreamRecords, upstream: UpstreamClient, clock: Callable[[], float]) -> None:
        """`clock`: returns seconds since 1970."""
        self._records = records
        self._upstream = upstream
        self._clock = clock
        self._unsaved: OrderedDict[Digest, tuple[float, frozenset[str]]] = OrderedDict()
        """Records that could not be stored, by blob: the time, and the endpoints that sent corrupt bytes."""

    async def find_avoided(self, repo: RepositoryName, digest: Digest) -> AvoidedEndpoints:
        """Returns which endpoints to avoid for a blob. Raises UpstreamUnavailable if all endpoints are untrusted;
        `retry_after` is the number of seconds until the first pause ends.

        - An endpoint is untrusted until its pause (`sender_pause`) ends.
        - An endpoint is asked last if its record could not be stored.
        - An endpoint is asked last if it sent corrupt bytes more often than another endpoint that has no pause now."""
        bad_senders = await self._records.bad_senders(self._upstream.name, digest, FORGET_SENDER_SECONDS)
        unsaved = self._unsaved_endpoints(digest)
        if not bad_senders:
            return AvoidedEndpoints(unsaved)
        waits_by_endpoint = {
            endpoint: self._remaining_pause(bad_senders[endpoint]) if endpoint in bad_senders else 0.0
            for endpoint in self._upstream.endpoints
        }
        usable = [endpoint for endpoint, wait in waits_by_endpoint.items() if wait <= 0]
        if not usable:
            raise self._bad_bytes_error(repo, digest, ", ".join(waits_by_endpoint), min(waits_by_endpoint.values()))
        fewest_times = min(bad_senders[endpoint].count if endpoint in bad_senders else 0 for endpoint in usable)
        ask_last = frozenset(endpoint for endpoint, bad in bad_senders.items() if bad.count > fewest_times)
        return AvoidedEndpoints(
            ask_last | unsaved,
            {
                endpoint: self._bad_bytes_error(repo, digest, endpoint, wait)
                for endpoint, wait in waits_by_endpoint.items()
                if wait > 0
            },
        )

    def _remaining_pause(self, bad_sender: CorruptionRecord) -> float:
        """Returns the seconds until the endpoint may be asked again; 0 or less if it may be asked now."""
        pause = sender_pause(bad_sender.count)
        # Returns at most `pause`, even if the clock was set back.
        return min(bad_sender.at + pause - self._clock(), pause)

    def _bad_bytes_error(
        self, repo: RepositoryName, digest: Digest, endpoints: str, wait: float
    ) -> UpstreamUnavailable:
        """Returns the error for untrusted endpoints. `endpoints`: their URLs, separated by commas. `wait`: number of
        seconds until they are asked for the blob again."""
        return UpstreamUnavailable(
            f"the upstream {self._upstream.name} ({endpoints}) sent wrong bytes for {digest}; it is asked again in "
            f"{ceil(wait)} s, or immediately after the command: entrepot mirror refresh {repo}@{digest}",
            {"digest": digest},
            retry_after=ceil(wait),
        )

    async def add(self, repo: RepositoryName, digest: Digest, endpoints: Collection[str]) -> None:
        """Records that `endpoints` sent corrupt bytes for a blob. Call this method once for each download with a wrong
        digest, in the process that has verified the digest. `endpoints`: the endpoints that sent bytes to this process.
        It is empty if other processes have downloaded all bytes: this process does not know which endpoints they asked.
        If the record cannot be stored, logs the failure, and this process asks the endpoints last, without a pause."""
        log.error(
            "the bytes of the blob %s for %s, received from %s, do not match its digest and are deleted",
            digest,
            repo,
            ", ".join(sorted(endpoints)) or "endpoints that another process asked",
        )
        try:
            await self._records.save_bad_senders(self._upstream.name, digest, endpoints, FORGET_SENDER_SECONDS)
        except (StorageFull, StorageFailed) as error:
            log.warning("cannot record that %s sent corrupt bytes: %s", self._upstream.name, error.message)
            self._remember_unsaved(digest, endpoints)

    def _remember_unsaved(self, digest: Digest, endpoints: Collection[str]) -> None:
        """Remembers in memory that `endpoints` sent corrupt bytes for a blob. Forgets the oldest record if there
        are more than `MAX_UNSAVED_BLOBS` records."""
        known_endpoints = self._unsaved_endpoints(digest)
        self._unsaved[digest] = self._clock(), known_endpoints.union(endpoints)
        self._unsaved.move_to_end(digest)
        if len(self._unsaved) > MAX_UNSAVED_BLOBS:
            self._unsaved.popitem(last=False)

    def _unsaved_endpoints(self, digest: Digest) -> frozenset[str]:
        """Returns the endpoints of the blob's record in memory; no endpoints if there is no record, or if the
        record is older than `FORGET_SENDER_SECONDS`."""
        at, endpoints = self._unsaved.get(digest, (0.0, frozenset[str]()))
        age = self._clock() - at  # negative if the clock was set back
        return endpoints if -CLOCK_TOLERANCE_SECONDS <= age < FORGET_SENDER_SECONDS else frozenset()
