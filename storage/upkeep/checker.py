"""Checks a whole store while other processes use it (`Checker`). Checks that the metadata is consistent, that the bytes
of each blob are stored, and that all stored bytes belong to a blob.

The store changes during the check, so a second check must confirm each problem. The second check of a blob holds the
lock of the blob's digest. Pushes and garbage collection hold the same lock while they change the blob's bytes and its
row in the metadata store. So the bytes and the row must agree during the second check.

A repair takes a damaged blob *out of use*: it records the damage, and moves the bytes to the *quarantine*, which keeps
damaged bytes (`storage.upkeep.quarantine`). The registry does not serve such a blob until its right bytes are stored
again. The next check of the store does not report a recorded damage as a problem. If a check takes too many consecutive
blobs out of use, the check ends with an error (`DamageBrake`), because the disk itself may be at fault.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

from storage.blobs.blob_store import UNREADABLE, BlobStore, BytesMissing, ListedBlob
from storage.consistency import BlobRecord, Consistency, Key, Problem, ProblemCode
from storage.damage import DamageRecords, StoredBlob
from storage.errors import BytesForbidden
from storage.leases import DigestLocks
from storage.metadata.catalog import Metadata
from storage.names import Digest
from storage.upkeep.collector import MIN_STRAY_AGE_SECONDS
from storage.upkeep.quarantine import MISSING, DamageBrake, FoundDamage, Quarantine

BATCH_SIZE: Final = 500
"""Largest number of blobs for one call of the metadata store or blob store."""
MISSING_CONTENT_CODES: Final = frozenset({ProblemCode.MANIFEST_BLOB_MISSING, ProblemCode.INDEX_CHILD_MISSING})
"""Problems that are not reported for a mirrored repository, because the mirror fetches missing content on request."""


@dataclass(frozen=True, slots=True)
class ConfirmedProblem:
    """A problem that the second check has confirmed. `repair`: tells people how the problem was repaired; None: it was
    not repaired."""

    problem: Problem
    repair: str | None


@dataclass(slots=True)
class CheckReport:
    """The result of a check. `found`: number of problems of each kind. `repaired`: number of repaired problems.
    `damaged`: number of blobs and manifests that are recorded as damaged after the check."""

    found: dict[ProblemCode, int] = field(default_factory=dict)
    repaired: int = 0
    damaged: int = 0

    @property
    def left(self) -> int:
        """Number of problems that were not repaired."""
        return sum(self.found.values()) - self.repaired


@dataclass(frozen=True, slots=True)
class CheckOptions:
    """The options of a check.

    - `repair`: whether to repair the problems that can be repaired without a loss of content.
    - `hash_bytes`: whether to read the stored bytes of each blob and compare them with its digest.
    - `max_quarantine_bytes`: largest size of the quarantine after a check with `repair`; None: no limit.
    - `is_mirrored`: returns whether a repository is mirrored. A mirrored repository may lack content to which its
      manifests refer."""

    repair: bool = False
    hash_bytes: bool = False
    max_quarantine_bytes: int | None = None
    is_mirrored: Callable[[str], bool] = lambda name: False


OnProblem = Callable[[ConfirmedProblem], Awaitable[None]]
"""Called with each confirmed problem. If the function raises an error, the check ends with this error."""
OnProgress = Callable[[int, int, str], Awaitable[None]]
"""Called with the number of checked rows, the approximate number of all rows, and a text that says what is being
checked. If the function raises an error, the check ends with this error."""


@dataclass(frozen=True, slots=True)
class Checker:
    """Checks a store. Several processes may check a store at the same time. `clock` returns the time in seconds since
    1970."""

    consistency: Consistency
    metadata: Metadata
    blobs: BlobStore
    damage: DamageRecords
    locks: DigestLocks
    clock: Callable[[], float]

    async def check(self, options: CheckOptions, on_problem: OnProblem, on_progress: OnProgress) -> CheckReport:
        """Checks the whole store and returns a report. Calls `on_problem` for each problem. If the database file itself
        is damaged, checks nothing else. Raises StorageFull. Raises StorageFailed if the store fails, or if the check
        has taken too many consecutive blobs out of use (`DamageBrake`). An error or a cancellation does not undo
        earlier repairs."""
        this_check = _Check(self, options, on_problem, on_progress)
        await this_check.run()
        return this_check.report


class _Check:
    """One check of a store."""

    def __init__(self, checker: Checker, options: CheckOptions, on_problem: OnProblem, on_progress: OnProgress) -> None:
        self._consistency = checker.consistency
        self._metadata = checker.metadata
        self._blobs = checker.blobs
        self._damage = checker.damage
        self._quarantine = Quarantine(checker.blobs, checker.damage, checker.locks)
        self._brake = DamageBrake()
        self._new_quarantine_bytes = 0
        """Number of bytes that this check has added to the quarantine since it last shrank the quarantine."""
        self._locks = checker.locks
        self._clock = checker.clock
        self._options = options
        self._on_problem = on_problem
        self._on_progress = on_progress
        self._done = self._total = 0
        self.report = CheckReport()

    async def run(self) -> None:
        """Runs the check. `report` then has the result."""
        await self._on_progress(0, 0, "checking the database")
        if await self._check_database(may_repair=self._options.repair):
            return
        self._total = await self._consistency.count_rows() + self._blobs.shard_count
        for area in self._consistency.areas:
            await self._check_area(area)
        await self._check_blobs()
        for shard in range(self._blobs.shard_count):
            await self._check_shard(shard)
        if self._options.repair:
            await self._blobs.reclaim_space()
            await self._shrink_quarantine()
        self.report.damaged = await self._damage.damaged_count()

    async def _check_database(self, *, may_repair: bool) -> bool:
        """Checks the database file. Returns whether any part except the search index is damaged. With `may_repair`,
        repairs the search index if no other part is damaged."""
        problems = await self._consistency.check_database()
        is_damaged = any(problem.code is ProblemCode.DATABASE for problem in problems)
        # The repair drops the tables of the search index. If other parts are damaged, it could increase the damage.
        may_repair &= not is_damaged
        for problem in problems:
            repair = await self._consistency.repair(problem) if may_repair else None
            await self._note(problem, repair)
            if repair is not None:
                # `check_database` may have stopped at the damage of the search index, before it read the other tables.
                return await self._check_database(may_repair=False)
        return is_damaged

    async def _note(self, problem: Problem, repair: str | None = None) -> None:
        """Counts a problem and reports it. `repair`: how the problem was repaired; None if it was not repaired."""
        self.report.found[problem.code] = self.report.found.get(problem.code, 0) + 1
        self.report.repaired += repair is not None
        await self._on_problem(ConfirmedProblem(problem, repair))

    async def _advance(self, rows: int, message: str) -> None:
        self._done += rows
        self._total = max(self._total, self._done)
        await self._on_progress(self._done, self._total, message)

    async def _check_area(self, area: str) -> None:
        """Checks one of the areas of the metadata (`Consistency.areas`). With the option `repair`, also repairs the
        problems."""
        last_key: Key | None = None
        while True:
            page = await self._consistency.check(area, last_key)
            for candidate in page.problems:
                if candidate.code in MISSING_CONTENT_CODES and self._options.is_mirrored(candidate.repository):
                    continue
                problem = await self._consistency.recheck(candidate)
                if problem is not None:
                    repair = await self._consistency.repair(problem) if self._options.repair else None
                    await self._note(problem, repair)
            await self._advance(page.rows, f"checking {area.replace('_', ' ')} rows")
            last_key = page.last
            if last_key is None:
                return

    async def _check_blobs(self) -> None:
        """Checks that the blob store has the bytes of each blob. With the option `hash_bytes`, also checks that the
        bytes have the blob's digest."""
        last_id = 0
        while records := await self._consistency.list_blobs(last_id, BATCH_SIZE):
            last_id = records[-1].id
            # The `place` of a blob is the key of its bytes. It is empty if the blob is recorded as damaged.
            usable_records = [record for record in records if record.place]
            sizes = await self._blobs.stored_sizes([record.place for record in usable_records])
            for record, size in zip(usable_records, sizes, strict=True):
                is_taken_out = False
                if size not in (record.size, UNREADABLE):
                    is_taken_out = await self._confirm_size(record.digest)
                elif self._options.hash_bytes or size == UNREADABLE:
                    is_taken_out = await self._check_bytes(_stored_blob(record))
                self._brake.note(is_damaged=is_taken_out)
                if self._options.hash_bytes:
                    await self._advance(1, "hashing blobs")
            if not self._options.hash_bytes:
                await self._advance(len(records), "checking blobs")

    async def _confirm_size(self, digest: Digest) -> bool:
        """Confirms that the bytes of a blob are missing or have the wrong size: makes the second check, after the first
        check has found this problem. Reports or repairs the problem if it still exists. Returns whether it took the
        blob out of use."""
        async with self._locks.hold(digest):
            record = await self._consistency.find_blob(digest)
            if record is None or not record.place:
                return False
            [size] = await self._blobs.stored_sizes([record.place])
            # If the bytes are unreadable now, `_confirm_size` does not report them. The next `check` of the whole store
            # reports them.
            if size in (record.size, UNREADABLE):
                return False
            version = await self._blobs.version(record.place) if self._options.repair else None
        blob = _stored_blob(record)
        if size is None:
            text = "the bytes of the blob are missing; push it again, or pull it again if it is mirrored"
            problem = Problem(ProblemCode.BLOB_FILE_MISSING, text, item=digest)
            reason = MISSING
        else:
            text = f"the blob has {blob.size} bytes, but {size} are stored; push it again, or repair it"
            problem = Problem(ProblemCode.BLOB_FILE_SIZE, text, item=digest)
            reason = f"{size} bytes are stored instead of {blob.size}"
        if not self._options.repair:
            await self._note(problem)
        elif size is not None and await self._has_digest(blob, size, version):
            await self._correct_size(problem, blob, size, version)
        else:
            return await self._take_out(problem, FoundDamage(digest, blob.place, reason, version), size or 0)
        return False

    async def _has_digest(self, blob: StoredBlob, size: int, version: str | None) -> bool:
        """Returns whether the stored bytes have the digest of the blob. `size`: the number of stored bytes. `version`:
        the text that identifies these bytes (`BlobStore.version`). Returns False if the bytes have been removed or
        replaced since `version` was read."""
        try:
            check = await self._blobs.check(blob.digest, size, blob.place, self._report_read)
        except BytesMissing:
            return False
        return check.problem is None and check.version == version

    async def _correct_size(self, problem: Problem, blob: StoredBlob, size: int, version: str | None) -> None:
        """Corrects the recorded size, unless the bytes have been removed or replaced since they were checked.
        `version`: the text that identifies the checked bytes (`BlobStore.version`)."""
        async with self._locks.hold(blob.digest):
            is_same = await self._blobs.version(blob.place) == version
            is_done = is_same and await self._consistency.set_size(blob.digest, blob.place, size)
        if is_done:
            await self._note(
                problem, "corrected the recorded size, because the stored bytes have the digest of the blob"
            )

    async def _check_bytes(self, blob: StoredBlob) -> bool:
        """Compares the bytes of a blob with its digest. Returns whether it took the blob out of use.

        - If the bytes are damaged, reports or repairs the damage.
        - If this process has no permission to read the bytes, reports a problem but repairs nothing, because the bytes
          may be right."""
        try:
            damage = await self._quarantine.find_damage(blob, self._report_read, self._report_read)
        except BytesForbidden as error:
            await self._note(Problem(ProblemCode.BLOB_FILE_FORBIDDEN, error.message, item=blob.digest))
            return False
        if damage is None:
            return False
        if damage.version is None:  # the bytes were removed after their size was read
            return await self._confirm_size(blob.digest)
        text = (
            "the stored bytes have another digest or cannot be read; push the blob again, or pull it if it is mirrored"
        )
        problem = Problem(ProblemCode.BLOB_FILE_DIGEST, text, item=blob.digest)
        if self._options.repair:
            return await self._take_out(problem, damage, blob.size)
        async with self._locks.hold(blob.digest):
            is_current = await self._quarantine.is_current(damage)
        if is_current:
            await self._note(problem)
        return False

    async def _take_out(self, problem: Problem, damage: FoundDamage, size: int) -> bool:
        """Takes a damaged blob out of use, unless its bytes were removed or replaced after they were read. `size`: the
        number of damaged bytes. Returns whether it took the blob out of use."""
        if not await self._quarantine.take_out(damage):
            return False
        await self._note(
            problem, "recorded the blob as damaged; the registry does not serve it until it is stored again"
        )
        self._new_quarantine_bytes += size
        max_bytes = self._options.max_quarantine_bytes
        # To shrink the quarantine after each blob would take long, because each call lists the whole quarantine.
        if max_bytes is not None and self._new_quarantine_bytes * 8 > max_bytes:
            await self._shrink_quarantine()
        return True

    async def _shrink_quarantine(self) -> None:
        if self._options.max_quarantine_bytes is not None:
            await self._quarantine.shrink(self._options.max_quarantine_bytes)
        self._new_quarantine_bytes = 0

    async def _report_read(self, count: int) -> None:
        """Reports progress while bytes are read. `on_progress` can then end the check during the read of a large
        blob."""
        await self._advance(0, "hashing blobs")

    async def _check_shard(self, shard: int) -> None:
        """Checks a shard (a part of the blob store) for *strays*: stored bytes whose digest has no row in the metadata
        store. Reports a shard that this process has no permission to list."""
        written_before = self._clock() - MIN_STRAY_AGE_SECONDS
        try:
            listed_blobs = await self._blobs.list_shard(shard)
        except BytesForbidden as error:
            await self._note(Problem(ProblemCode.BLOB_FILE_FORBIDDEN, error.message))
            listed_blobs = []
        for start in range(0, len(listed_blobs), BATCH_SIZE):
            old_blobs = [
                listed for listed in listed_blobs[start : start + BATCH_SIZE] if listed.written < written_before
            ]
            known_digests = await self._metadata.known_blobs([listed.digest for listed in old_blobs])
            for listed in old_blobs:
                if listed.digest not in known_digests:
                    await self._confirm_stray(listed)
        await self._advance(1, "looking for stray files")

    async def _confirm_stray(self, stray: ListedBlob) -> None:
        """Makes the second check of a stray, and reports the stray if it still exists. With the option `repair`, also
        removes its bytes, unless the store cannot read them."""
        async with self._locks.hold(stray.digest):
            if stray.digest in await self._metadata.known_blobs([stray.digest]):
                return
            [size] = await self._blobs.stored_sizes([stray.place])
            if size is None or (stray.size == UNREADABLE and size != UNREADABLE):  # the stray has changed
                return
            repair = None
            if self._options.repair and size != UNREADABLE:
                await self._blobs.remove(stray.place)
                repair = "removed the bytes"
        if size == UNREADABLE:
            text = "a file belongs to no blob and cannot be read; check the file's owner and the file system"
        else:
            text = f"a file of {size} bytes belongs to no blob; garbage collection removes it after its grace period"
        await self._note(Problem(ProblemCode.STRAY, text, item=stray.digest), repair)


def _stored_blob(record: BlobRecord) -> StoredBlob:
    """Converts a record for the methods of `Quarantine`."""
    return StoredBlob(record.id, record.digest, record.size, record.place)
