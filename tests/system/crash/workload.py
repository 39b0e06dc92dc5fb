"""The workload of the crash tests: a fixed sequence of requests to a registry (`Workload`), and a check of the registry
after the sequence was interrupted (`StateCheck`).

Each request is announced before it starts, and acknowledged after it has returned without an error. `RequestLog` lists
the acknowledged requests, and those that were announced but not acknowledged. From these two lists, the check computes
which content must exist, which must not exist, and which may exist: content of unacknowledged requests.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import pairwise
from pathlib import Path

from storage.content import OCI_MANIFEST, Actor, Manifest, digest_of
from storage.errors import (
    BlobUnknown,
    BlobUploadUnknown,
    ManifestUnknown,
    NameUnknown,
    RegistryError,
    StorageFailed,
    StorageFull,
)
from storage.interface import BlobWriter, Registry
from storage.names import Digest, RepositoryName, Tag, UploadID
from storage.store.stored_registry import StoredRegistry
from storage.upkeep.tag_changes import TagChanger
from tests.system.crash import account_workload

BY = Actor(name="tester")
MIB = 1024 * 1024
APP, WEB = RepositoryName("team/app"), RepositoryName("team/web")
FRESH = RepositoryName("team/later")
"""A repository to which only the checks push."""
SIZES = {  # bytes of each blob, by its name in this workload
    "config": 200, "small": 7000, "big": 2 * MIB + 17, "chunked": 70_001, "long": 40_000, "loose": 900, "gone": 5000,
    "left": 30_000, "cancelled": 20_000, "twice": 1234, "filled": 90_001, "half": 60_000,
}  # fmt: skip
CUTS = (0, 1, 30_000, 50_000, 70_001)
"""The bounds of the chunks of the blob `chunked`."""

Request = list[str | int]
"""A request of the workload: its kind and its arguments (see `ExpectedState.apply`)."""
Announce = Callable[[str, Request], None]
"""A function that gets `begin`, `done` or `failed`, and the request."""


@cache
def content(name: str) -> bytes:
    """Returns the bytes of a blob, by its name in `SIZES`."""
    return random.Random(name).randbytes(SIZES[name])


@cache
def digest(name: str, algorithm: str = "sha256") -> Digest:
    """Returns the digest of a blob, by its name in `SIZES`."""
    return digest_of(content(name), algorithm)


DIGESTS = {digest(name, algorithm): name for name in SIZES for algorithm in ("sha256", "sha512")}
"""For each digest of a blob, with SHA-256 and with SHA-512: the name of the blob in `SIZES`."""


def image(*layers: Digest) -> Manifest:
    def part(of: Digest, kind: str) -> dict[str, object]:
        return {"mediaType": f"application/{kind}", "digest": of, "size": SIZES[DIGESTS[of]]}

    document = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": part(digest("config"), "json"),
                "layers": [part(layer, "tar") for layer in layers]}  # fmt: skip
    return Manifest.parse(json.dumps(document).encode(), OCI_MANIFEST)


IMAGES = {
    "first": image(digest("small"), digest("big")),
    "second": image(digest("chunked"), digest("long", "sha512")),
    "third": image(digest("gone")),
}
IMAGES_BY_DIGEST = {manifest.digest: manifest for manifest in IMAGES.values()}


@dataclass
class RequestLog:
    """The requests that an interrupted run has announced. `acknowledged`: those that have returned without an error."""

    acknowledged: list[Request] = field(default_factory=list)
    unacknowledged: list[Request] = field(default_factory=list)
    """Requests that were running or have failed. They may or may not have taken effect."""

    def note(self, kind: str, request: Request) -> None:
        if kind == "begin":
            self.unacknowledged.append(request)
        elif kind == "done":
            self.unacknowledged.pop()
            self.acknowledged.append(request)


class Workload:
    """Sends the requests. Calls `announce("begin", request)` before each request, and `announce("done" or "failed",
    request)` after it. With a list `failures`, a failed request adds its error to the list, and the workload
    continues."""

    def __init__(
        self, registry: StoredRegistry, announce: Announce, failures: list[RegistryError] | None = None
    ) -> None:
        self.registry = registry
        self._announce = announce
        self.failures = failures

    async def _send(self, request: Request, send: Callable[[], object]) -> bool:
        self._announce("begin", request)
        try:
            await send()  # type: ignore[misc]
        except RegistryError as error:
            if self.failures is None:
                raise
            # After a failure of the storage, later requests may fail because they need the content of the failed one.
            # Such errors are not recorded.
            if isinstance(error, StorageFull | StorageFailed) or not self.failures:
                self.failures.append(error)
            self._announce("failed", request)
            return False
        self._announce("done", request)
        return True

    async def push(
        self, repo: RepositoryName, name: str, pieces: int = 1, algorithm: str = "sha256", declared: bool = True
    ) -> None:
        """Pushes a blob. `declared`: whether the start of the upload session names the digest algorithm. If not, all
        bytes are written to the file before the commit, which then has to read and hash them."""
        body = content(name)
        length = -(-len(body) // pieces)  # rounded up

        async def send() -> None:
            writer = await self.registry.start_upload(repo, algorithm if declared else "sha256")
            try:
                for at in range(0, len(body), length):
                    await writer.write(body[at : at + length])
                if not declared:
                    await writer.read_at(0, 1)  # before it reads, the writer writes its last batch to the file
                await writer.commit(digest(name, algorithm))
            finally:
                await _close(writer)

        await self._send(["blob", repo, digest(name, algorithm)], send)

    async def start(self, repo: RepositoryName) -> UploadID | None:
        """Starts an upload session. Returns its ID, or None if the request has failed."""
        started: list[UploadID] = []

        async def send() -> None:
            writer = await self.registry.start_upload(repo)
            started.append(writer.id)
            await writer.aclose()

        return started[0] if await self._send(["start"], send) else None

    async def append(self, repo: RepositoryName, upload: UploadID, name: str, start: int, stop: int) -> None:
        """Sends a chunk of a blob to an upload session."""

        async def send() -> None:
            writer = await self.registry.resume_upload(repo, upload, start)
            try:
                await writer.write(content(name)[start:stop])
            finally:
                await writer.aclose()

        await self._send(["upload", repo, upload, name, stop], send)

    async def finish(self, repo: RepositoryName, upload: UploadID, name: str, start: int) -> None:
        """Sends the rest of a blob to an upload session, and completes the session."""

        async def send() -> None:
            writer = await self.registry.resume_upload(repo, upload)
            try:
                await writer.write(content(name)[start:])
                await writer.commit(digest(name))
            finally:
                await _close(writer)

        await self._send(["finish", repo, upload, digest(name)], send)

    async def cancel(self, repo: RepositoryName, upload: UploadID) -> None:
        async def send() -> None:
            writer = await self.registry.resume_upload(repo, upload)
            await writer.cancel()
            await writer.aclose()

        await self._send(["cancel", repo, upload], send)

    async def write_partial(self, name: str, *pieces: tuple[int, int]) -> None:
        """Writes pieces of a blob into a partial blob, as a mirror does during a download from its upstream."""

        async def send() -> None:
            partial = await self.registry.partials.claim(digest(name), SIZES[name])
            try:
                for start, stop in pieces:
                    await asyncio.to_thread(partial.write_at, start, content(name)[start:stop])
            finally:
                partial.close()

        await self._send(["partial", digest(name), *(bound for piece in pieces for bound in piece)], send)

    async def commit_partial(self, repo: RepositoryName, name: str) -> None:
        """Makes a partial blob a complete blob. First writes the bytes that an earlier request could not write."""

        async def send() -> None:
            partial = await self.registry.partials.claim(digest(name), SIZES[name])
            try:
                for start, stop in partial.missing():
                    await asyncio.to_thread(partial.write_at, start, content(name)[start:stop])
                await partial.commit(repo)
            finally:
                partial.close()

        await self._send(["blob", repo, digest(name)], send)

    async def manifest(self, repo: RepositoryName, name: str, *tags: str) -> None:
        image_manifest = IMAGES[name]
        await self._send(
            ["manifest", repo, image_manifest.digest, *tags],
            lambda: self.registry.put_manifest(repo, image_manifest, [Tag(tag) for tag in tags], by=BY),
        )

    async def manage(self) -> None:
        """Changes accounts and rights."""
        for name, step in account_workload.STEPS.items():
            await self._send(["right", name], partial(step.change, self.registry.accounts))

    async def run(self) -> None:
        """Sends all requests in their order."""
        registry = self.registry
        for name, pieces in (("config", 1), ("small", 3), ("big", 5)):
            await self.push(APP, name, pieces)
        await self.manifest(APP, "first", "latest", "1")
        if (upload := await self.start(APP)) is not None:
            for start, stop in pairwise(CUTS[:-1]):
                await self.append(APP, upload, "chunked", start, stop)
            await self.finish(APP, upload, "chunked", CUTS[-2])
        await self.push(APP, "long", 2, "sha512", declared=False)
        await self.manifest(APP, "second", "latest")
        await self._send(["blob", WEB, digest("config")], lambda: registry.mount_blob(WEB, digest("config"), APP, BY))
        await self.push(WEB, "gone")
        await self.manifest(WEB, "third", "x", "y")
        await self.push(WEB, "loose")
        await self.push(APP, "twice")
        await self.push(WEB, "twice")
        if (upload := await self.start(WEB)) is not None:
            await self.append(WEB, upload, "cancelled", 0, 9000)
            await self.cancel(WEB, upload)
        await self._send(["untag", WEB, "y"], lambda: registry.delete_tag(WEB, Tag("y"), by=BY))
        await self._send(["unblob", WEB, digest("twice")], lambda: registry.delete_blob(WEB, digest("twice"), by=BY))
        third = IMAGES["third"].digest
        await self._send(["unmanifest", WEB, third], lambda: registry.delete_manifest(WEB, third, by=BY))
        if (upload := await self.start(WEB)) is not None:
            await self.append(WEB, upload, "left", 0, 11_000)
            await self.append(WEB, upload, "left", 11_000, 12_000)
        await self.write_partial("filled", (30_000, 60_000), (0, 30_000), (60_000, 90_001))
        await self.commit_partial(APP, "filled")
        await self.write_partial("half", (0, 10_000), (30_000, 40_000))
        await self._send(["collect"], registry.collector.collect)
        await self.push(WEB, "gone", 2)
        await self.push(WEB, "config")
        await self.manifest(WEB, "third", "z")
        await self._send(["unmanifest", WEB, third], lambda: registry.delete_manifest(WEB, third, by=BY))
        changes = TagChanger(registry.tag_history, registry.immutable_tags)
        await self._send(["manifest", WEB, third, "z"], lambda: changes.restore(WEB, Tag("z"), by=BY))
        await self.manage()


async def _close(writer: BlobWriter) -> None:
    try:
        await writer.aclose()
    except (BlobUploadUnknown, StorageFull, StorageFailed):
        # The commit has failed before and has raised the error already.
        return


@dataclass
class ExpectedState:
    """The content that the registry must have after the acknowledged requests. The keys are pairs of a repository and a
    digest, tag or upload ID."""

    blobs: set[tuple[str, str]] = field(default_factory=set)
    manifests: set[tuple[str, str]] = field(default_factory=set)
    tags: dict[tuple[str, str], str] = field(default_factory=dict)
    uploads: dict[tuple[str, str], tuple[str, int]] = field(default_factory=dict)
    """The name of the blob and the acknowledged number of bytes of each upload session."""
    account_facts: frozenset[account_workload.Fact] = frozenset()
    """The facts that are true of the accounts."""

    def apply(self, request: Request) -> None:
        kind, *words = request
        texts = [str(word) for word in words]
        match kind:
            case "blob":
                self.blobs.add((texts[0], texts[1]))
            case "unblob":
                self.blobs.discard((texts[0], texts[1]))
            case "manifest":
                self.manifests.add((texts[0], texts[1]))
                self.tags.update({(texts[0], tag): texts[1] for tag in texts[2:]})
            case "unmanifest":
                self.manifests.discard((texts[0], texts[1]))
                for key in [k for k, to in self.tags.items() if k[0] == texts[0] and to == texts[1]]:
                    del self.tags[key]
            case "untag":
                self.tags.pop((texts[0], texts[1]), None)
            case "upload":
                self.uploads[texts[0], texts[1]] = (texts[2], int(texts[3]))
            case "finish":
                self.uploads.pop((texts[0], texts[1]), None)
                self.blobs.add((texts[0], texts[2]))
            case "cancel":
                self.uploads.pop((texts[0], texts[1]), None)
            case "right":
                self.account_facts = account_workload.after(self.account_facts, texts[0])
            case "collect":
                self.blobs = {key for key in self.blobs if key in self.referred_blobs()}

    def referred_blobs(self) -> set[tuple[str, str]]:
        """Returns the blobs to which manifests refer, as pairs of repository and digest."""
        return {(repo, str(d.digest)) for repo, of in self.manifests for d in IMAGES_BY_DIGEST[Digest(of)].blobs}


@dataclass
class StateCheck:
    """Compares a registry with the requests. `survived`: the machine kept running, so all acknowledged bytes of upload
    sessions are there. After a power cut a session may have fewer bytes, but its reported offset must be true.
    `faults`: the storage refused a step during the run. So the upload session of an unacknowledged request may have
    been deleted."""

    registry: StoredRegistry
    request_log: RequestLog
    survived: bool = True
    faults: bool = False

    def __post_init__(self) -> None:
        self.states = [ExpectedState()]
        for request in self.request_log.acknowledged:
            self.states[0].apply(request)
        for request in self.request_log.unacknowledged:
            # Each of these requests may or may not have taken effect. No two of them change the same content, so each
            # part of the content must be as in one of the states.
            state_after = ExpectedState(
                set(self.states[-1].blobs), set(self.states[-1].manifests), dict(self.states[-1].tags),
                dict(self.states[-1].uploads), self.states[-1].account_facts,
            )  # fmt: skip
            state_after.apply(request)
            self.states.append(state_after)

    async def check_all(self) -> None:
        await self.blobs()
        await self.manifests()
        await self.uploads()
        await self.partials()
        self.accounts()
        await self.push_again()

    async def blobs(self) -> None:
        """Checks that acknowledged blobs exist, and that every blob has the bytes of its digest."""
        for repo in (APP, WEB):
            for wanted, name in DIGESTS.items():
                stored = await read(self.registry, repo, wanted)
                allowed = {(repo, wanted) in state.blobs for state in self.states}
                assert stored is None or stored == content(name), f"{repo} serves wrong bytes for {name}"
                assert (stored is not None) in allowed, (
                    f"{name} in {repo}: {stored is not None}; {self.request_log.unacknowledged}"
                )

    async def manifests(self) -> None:
        """Checks that manifests and tags are as acknowledged, and that every blob that they need exists."""
        for repo in (APP, WEB):
            for image_manifest in IMAGES.values():
                allowed = {(repo, image_manifest.digest) in state.manifests for state in self.states}
                try:
                    assert (await self.registry.get_manifest(repo, image_manifest.digest)).body == image_manifest.body
                    stored = True
                except ManifestUnknown:
                    stored = False
                assert stored in allowed, (
                    f"manifest {image_manifest.digest} in {repo}: {stored}; {self.request_log.unacknowledged}"
                )
                for part in image_manifest.blobs if stored else ():
                    assert await read(self.registry, repo, part.digest) is not None
            try:
                tags = (await self.registry.tags(repo, None, 100)).items
            except NameUnknown:
                tags = ()
            found = {tag: (await self.registry.resolve_manifest(repo, tag)).digest for tag in tags}
            assert found in [{t: to for (r, t), to in state.tags.items() if r == repo} for state in self.states]

    async def uploads(self) -> None:
        """Checks that the offset of each upload session is true, that its bytes are those that were sent, and that the
        session can be finished."""
        for repo, upload in {key for state in self.states for key in state.uploads}:
            name = next(state.uploads[repo, upload][0] for state in self.states if (repo, upload) in state.uploads)
            expected = [state.uploads.get((repo, upload)) for state in self.states]
            repository, session = RepositoryName(repo), UploadID(upload)
            try:
                offset = await self.registry.upload_offset(repository, session)
            except BlobUploadUnknown:
                may_be_deleted = self.faults and any(upload in request for request in self.request_log.unacknowledged)
                assert None in expected or may_be_deleted or not self.survived, "an acknowledged session is gone"
                continue
            acknowledged_bytes = expected[0][1] if expected[0] is not None else 0
            # Whether an unacknowledged request was to complete or to cancel the session. Then bytes may be missing.
            committing = any(
                request[0] in ("finish", "cancel") and request[2] == upload
                for request in self.request_log.unacknowledged
            )
            assert offset >= acknowledged_bytes or not self.survived or committing, (
                f"{acknowledged_bytes} bytes acknowledged, {offset} are left"
            )
            assert offset <= SIZES[name]
            writer = await self.registry.resume_upload(repository, session, offset)
            assert await writer.read_at(0, SIZES[name]) == content(name)[:offset], "these are not the bytes sent"
            await writer.write(content(name)[offset : offset + 10])
            await writer.aclose()
            writer = await self.registry.resume_upload(repository, session, min(offset + 10, SIZES[name]))
            await writer.write(content(name)[offset + 10 :])
            await writer.commit(digest(name))
            await writer.aclose()
            assert await read(self.registry, repository, digest(name)) == content(name)

    async def partials(self) -> None:
        """Checks that a partial blob has its bytes if the machine kept running, and that it can be completed."""
        acknowledged = self.request_log.acknowledged
        for request in [request for request in acknowledged if request[0] == "partial"]:
            blob, bounds = Digest(str(request[1])), [int(bound) for bound in request[2:]]
            name, pieces = DIGESTS[blob], list(zip(bounds[::2], bounds[1::2], strict=True))
            if ["blob", APP, blob] in acknowledged or await read(self.registry, APP, blob):
                continue  # the partial blob has become a complete blob
            partial = await self.registry.partials.claim(blob, SIZES[name])
            assert partial.is_owner
            missing = partial.missing()
            lost_spans = [gap for gap in missing for piece in pieces if gap[0] < piece[1] and piece[0] < gap[1]]
            assert not lost_spans or self.faults or not self.survived, f"{lost_spans} of {name} would be fetched again"
            if name == "filled":
                for start, stop in missing:
                    await asyncio.to_thread(partial.write_at, start, content(name)[start:stop])
                await partial.commit(FRESH)
                assert await read(self.registry, FRESH, blob) == content(name)
            partial.close()

    def accounts(self) -> None:
        """Checks that accounts and rights are as acknowledged. An interrupted change is either done, with its entry in
        the audit log, or not done at all."""
        found, allowed = account_workload.facts(self.registry.accounts), [state.account_facts for state in self.states]
        if not self.faults:
            assert found in allowed, f"{sorted(found)}; {self.request_log.unacknowledged}"
        for fact in found.union(*allowed):
            assert (fact in found) in {fact in state for state in allowed}, f"{fact}; {self.request_log.unacknowledged}"

    async def push_again(self) -> None:
        """Checks that the same content can be pushed again, in spite of leftover files."""
        for digest, name in DIGESTS.items():
            if digest.algorithm == "sha512" and name != "long":
                continue
            writer = await self.registry.start_upload(FRESH, digest.algorithm)
            await writer.write(content(name))
            await writer.commit(digest)
            await writer.aclose()
            assert await read(self.registry, FRESH, digest) == content(name)


async def read(registry: Registry, repo: RepositoryName, digest: Digest) -> bytes | None:
    """Returns the bytes of a blob, or None if the repository does not have it."""
    try:
        reader = await registry.open_blob(repo, digest)
    except BlobUnknown:
        return None
    try:
        return b"".join([chunk async for chunk in reader])
    finally:
        await reader.aclose()


async def sweep(registry: StoredRegistry) -> None:
    """Runs enough rounds of garbage collection to cover every shard."""
    for _ in range(33):
        await registry.collector.collect()


def files_below(folder: Path) -> list[Path]:
    return [Path(place, name) for place, _, names in os.walk(folder) for name in names]


def referred_files(data: Path, blobs: Sequence[tuple[str, str]]) -> set[Path]:
    """Returns the files of these blobs, which are pairs of repository and digest."""
    return {data / "blobs" / Digest(d).algorithm / Digest(d).encoded[:2] / Digest(d).encoded for _, d in blobs}
