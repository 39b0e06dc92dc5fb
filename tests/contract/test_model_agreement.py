"""The stored registry answers as the reference model does, whatever is asked of it in whatever order.

`ENTREPOT_MODEL_RUNS=2000` makes a night's run of it; the steps are random there, and the same each time otherwise.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, precondition, rule

from storage.composition import OpenContent, open_files, open_registry, prepare_data_dir
from storage.content import OCI_INDEX, OCI_MANIFEST, Actor, Condition, Manifest, Span, digest_of
from storage.interface import Registry
from storage.memory_registry import MemoryRegistry
from storage.names import Digest, RepositoryName, Tag, UploadID
from storage.patterns import ALL_NAMES, NO_NAMES, NameSet
from storage.store.stored_registry import StoredRegistry
from storage.upkeep.collector import Collector
from tests.fakes.object_store.multipart_blob_store import open_objects
from tests.fakes.registry_content import descriptor_of, image_of, index_of
from tests.fakes.temporary_files import memory_root

from .registry_pair import Raised, RegistryPair, UploadPair, read_blob

BY = Actor("model")
REPOS = [RepositoryName(name) for name in ("a", "a/b")]
TAGS = [Tag(name) for name in ("latest", "v1", "Z")]
BLOBS = [b"", b"config", b"layer" * 50]
ALGORITHMS = ["sha256", "sha512"]
BLOB_DIGESTS = [digest_of(data, algorithm) for data in BLOBS for algorithm in ALGORITHMS]
UNKNOWN = digest_of(b"nobody has this")
CURSORS = [None, "", "A", "a", "a/", "b", "latest", "z", "é", BLOB_DIGESTS[1], "sha256:8"]
HOUR = 3600.0

repos = st.sampled_from(REPOS)
tags = st.sampled_from(TAGS)
contents = st.sampled_from(BLOBS)
blob_digests = st.sampled_from(BLOB_DIGESTS)
algorithms = st.sampled_from(["sha256", "sha256", "sha256", "sha512"])
cursors = st.sampled_from(CURSORS)
name_sets = st.sampled_from(
    [ALL_NAMES, NO_NAMES, NameSet.of(["a"]), NameSet.of(["*/b", "c/**"]), NameSet.of(["**"], ["a"])]
)
people = st.sampled_from([None, BY, Actor("somebody else")])
limits = st.sampled_from([1, 2, 3, 100])
spans = st.none() | st.builds(Span, st.integers(-20, 60), st.none()) | st.builds(Span, st.just(2), st.integers(0, 60))


class Agreement(RuleBasedStateMachine):
    """Drives both; each rule compares their answers. Time stands still but for the rule that lets it pass."""

    uploads: Bundle[UploadPair] = Bundle("uploads")
    manifests: Bundle[Manifest] = Bundle("manifests")

    def __init__(self) -> None:
        super().__init__()
        self.now = 1_000_000.0
        self.known: set[Digest] = {UNKNOWN, *BLOB_DIGESTS}
        self.loop = asyncio.new_event_loop()
        self.directory = tempfile.TemporaryDirectory(dir=memory_root())
        self.data = Path(self.directory.name) / "data"
        prepare_data_dir(self.data)
        self.model = MemoryRegistry(self.clock)
        self.pair = RegistryPair(self.loop, self.model, self.open())
        self.held: list[UploadPair] = []
        self.placed: list[tuple[RepositoryName, Manifest]] = []
        self.changed = False

    @invariant()
    def alike(self) -> None:
        """After each change everything that can be seen is the same."""
        if self.changed:
            self.changed = False
            self.pair.compare_all(REPOS, sorted(self.known), TAGS)

    def change(self, call: Callable[[Registry], Awaitable[Any]]) -> Any:
        self.changed = True
        return self.pair.ask(call)

    def clock(self) -> float:
        return self.now

    def content(self) -> OpenContent:
        """Where the bytes lie."""
        return open_files

    def open(self) -> StoredRegistry:
        self.opened: AbstractAsyncContextManager[StoredRegistry] = open_registry(
            self.data, clock=self.clock, open_content=self.content()
        )
        self.stored = self.loop.run_until_complete(self.opened.__aenter__())
        return self.stored

    def close(self) -> None:
        self.loop.run_until_complete(self.opened.__aexit__(None, None, None))

    def teardown(self) -> None:
        """At the end, and after a restart, everything that can be seen is the same."""
        try:
            self.restart()
            self.alike()
        finally:
            for upload in self.held:
                for writers in upload.old:
                    self.loop.run_until_complete(self.drop(writers))
            self.close()
            self.loop.close()
            self.directory.cleanup()

    @staticmethod
    async def drop(writers: list[Any]) -> None:
        for writer in writers:
            await asyncio.gather(writer.aclose(), return_exceptions=True)

    # Uploads

    @rule(target=uploads, repo=repos, algorithm=algorithms, by=people)
    def start(self, repo: RepositoryName, algorithm: str, by: Actor | None) -> UploadPair:
        return self.begin(repo, algorithm, by)

    def begin(self, repo: RepositoryName, algorithm: str, by: Actor | None = None) -> UploadPair:
        writers = self.pair.get([registry.start_upload(repo, algorithm, by=by) for registry in self.pair.both])
        upload = UploadPair(repo, [writer.id for writer in writers], writers)
        self.held.append(upload)
        return upload

    @rule(repo=repos, data=contents, algorithm=algorithms)
    def push_blob(self, repo: RepositoryName, data: bytes, algorithm: str) -> None:
        upload = self.begin(repo, algorithm)
        self.write(upload, data)
        self.end(upload, [writer.commit(digest_of(data, algorithm)) for writer in upload.writers or ()])

    @rule(upload=uploads, data=contents)
    def write(self, upload: UploadPair, data: bytes) -> None:
        if upload.writers is None:
            return
        if not isinstance(self.pair.compare([writer.write(data) for writer in upload.writers]), Raised):
            upload.taken += data
        assert [writer.offset for writer in upload.writers] == [len(upload.taken)] * 2

    @rule(upload=uploads, start=st.integers(0, 20), length=st.integers(0, 1000))
    def read_at(self, upload: UploadPair, start: int, length: int) -> None:
        if upload.writers is not None:
            read = self.pair.compare([writer.read_at(start, length) for writer in upload.writers])
            assert read == upload.taken[start : start + length]

    @rule(upload=uploads)
    def let_go(self, upload: UploadPair) -> None:
        if upload.writers is not None:
            self.pair.compare([writer.aclose() for writer in upload.writers])
            upload.old.append(upload.writers)
            upload.writers = None

    @rule(upload=uploads, asked=st.sampled_from(["right", "right", "none", "wrong"]))
    def resume(self, upload: UploadPair, asked: str) -> None:
        """By someone else, at once: whoever has the session loses it, and with it what is not in the store yet."""
        self.land(upload)
        offset = {"right": len(upload.taken), "none": None, "wrong": len(upload.taken) + 1}[asked]
        resumed = self.pair.get(
            [
                registry.resume_upload(upload.repo, number, offset)
                for registry, number in zip(self.pair.both, upload.ids, strict=True)
            ]
        )
        if resumed:
            assert [writer.offset for writer in resumed] == [len(upload.taken)] * 2
            if upload.writers is not None:
                upload.old.append(upload.writers)
            upload.writers = resumed

    def land(self, upload: UploadPair) -> None:
        """Reading back makes a writer bring what it has gathered to the store."""
        if upload.writers is not None:
            self.pair.compare([writer.read_at(0, 0) for writer in upload.writers])

    @rule(upload=uploads)
    def status(self, upload: UploadPair) -> None:
        self.land(upload)
        self.ask_status(upload)

    def ask_status(self, upload: UploadPair) -> Any:
        return self.pair.compare(
            [
                registry.upload_offset(upload.repo, number)
                for registry, number in zip(self.pair.both, upload.ids, strict=True)
            ]
        )

    @rule(upload=uploads, repo=repos)
    def ask_for_it_elsewhere(self, upload: UploadPair, repo: RepositoryName) -> None:
        if repo != upload.repo:
            pairs = list(zip(self.pair.both, upload.ids, strict=True))
            assert isinstance(self.pair.compare([registry.upload_offset(repo, n) for registry, n in pairs]), Raised)
            assert isinstance(self.pair.compare([registry.resume_upload(repo, n) for registry, n in pairs]), Raised)

    @rule(upload=uploads, by=people)
    def ask_for_it_as(self, upload: UploadPair, by: Actor | None) -> None:
        """Nobody loses it by that, whether it is theirs or not."""
        self.land(upload)
        pairs = list(zip(self.pair.both, upload.ids, strict=True))
        self.pair.compare([registry.upload_offset(upload.repo, number, by=by) for registry, number in pairs])
        wrong = len(upload.taken) + 1
        told = self.pair.compare(
            [registry.resume_upload(upload.repo, number, wrong, by=by) for registry, number in pairs]
        )
        assert isinstance(told, Raised)

    @rule(upload=uploads, algorithm=algorithms, right=st.sampled_from([True, True, True, False]))
    def commit(self, upload: UploadPair, algorithm: str, right: bool) -> None:
        if upload.writers is not None:
            digest = digest_of(upload.taken if right else upload.taken + b"?", algorithm)
            self.known.add(digest)
            self.end(upload, [writer.commit(digest) for writer in upload.writers])

    @rule(repo=repos, data=contents, algorithm=algorithms)
    def commit_wrongly(self, repo: RepositoryName, data: bytes, algorithm: str) -> None:
        """What is sent is not what was announced: nothing of it stays."""
        upload = self.begin(repo, "sha256")
        self.write(upload, data + b"broken")
        self.end(upload, [writer.commit(digest_of(data, algorithm)) for writer in upload.writers or ()])

    @rule(repo=repos, data=contents, call=st.sampled_from(["write", "commit", "read_at"]))
    def take_over(self, repo: RepositoryName, data: bytes, call: str) -> None:
        """A push that breaks off, is resumed while its old connection lives on, and is ended by the new one."""
        upload = self.begin(repo, "sha256")
        self.write(upload, data[:3])
        self.resume(upload, "right")
        self.try_what_was_lost(upload, call)
        self.write(upload, data[3:])
        self.commit(upload, "sha256", right=True)
        self.try_what_was_lost(upload, call)

    @rule(upload=uploads)
    def cancel(self, upload: UploadPair) -> None:
        if upload.writers is not None:
            self.end(upload, [writer.cancel() for writer in upload.writers])

    def end(self, upload: UploadPair, calls: list[Any]) -> None:
        self.changed = True
        self.pair.compare(calls)
        assert isinstance(self.ask_status(upload), Raised)
        writers, upload.writers = upload.writers, None
        if writers is not None:
            self.pair.compare([writer.aclose() for writer in writers])
            upload.old.append(writers)

    @rule(upload=uploads, call=st.sampled_from(["write", "commit", "read_at"]))
    def try_what_was_lost(self, upload: UploadPair, call: str) -> None:
        """A writer that lost its session, or let it go, can do nothing with it."""
        for writers in upload.old[-1:]:
            calls: dict[str, Callable[[Any], Awaitable[Any]]] = {
                "write": lambda writer: self.write_and_close(writer),
                "read_at": lambda writer: writer.read_at(0, 1),
                "commit": lambda writer: writer.commit(digest_of(upload.taken)),
            }
            assert isinstance(self.pair.compare([calls[call](writer) for writer in writers]), Raised)

    @staticmethod
    async def write_and_close(writer: Any) -> None:
        await writer.write(b"too late")
        await writer.aclose()

    @rule(repo=repos)
    def resume_nothing(self, repo: RepositoryName) -> None:
        unknown = UploadID.random()
        assert isinstance(self.pair.ask(lambda registry: registry.resume_upload(repo, unknown)), Raised)
        assert isinstance(self.pair.ask(lambda registry: registry.upload_offset(repo, unknown)), Raised)

    # Blobs

    @rule(repo=repos, digest=blob_digests, source=name_sets | repos)
    def mount(self, repo: RepositoryName, digest: Digest, source: RepositoryName | NameSet) -> None:
        self.change(lambda registry: registry.mount_blob(repo, digest, source, BY))

    @rule(repo=repos, digest=blob_digests)
    def resolve_blob(self, repo: RepositoryName, digest: Digest) -> None:
        self.pair.ask(lambda registry: registry.resolve_blob(repo, digest))

    @rule(repo=repos, digest=blob_digests, span=spans)
    def open_blob(self, repo: RepositoryName, digest: Digest, span: Span | None) -> None:
        self.pair.ask(lambda registry: read_blob(registry, repo, digest, span))

    @rule(repo=repos, digest=blob_digests)
    def delete_blob(self, repo: RepositoryName, digest: Digest) -> None:
        self.change(lambda registry: registry.delete_blob(repo, digest, by=BY))

    # Manifests

    def made(self, manifest: Manifest) -> Manifest:
        self.known.add(manifest.digest)
        return manifest

    @initialize(target=manifests)
    def first_manifests(self) -> Any:
        config, layer = descriptor_of(BLOBS[1]), descriptor_of(BLOBS[2])
        image = self.made(image_of(config, [layer]))
        return multiple(image, self.made(index_of([image.descriptor])), self.made(index_of([])))

    @rule(
        target=manifests,
        parts=st.lists(st.tuples(contents, st.sampled_from(ALGORITHMS)), min_size=1, max_size=3),
        subject=st.none() | manifests,
        artifact_type=st.sampled_from([None, "sig/x"]),
        algorithm=algorithms,
    )
    def make_image(
        self,
        parts: list[tuple[bytes, str]],
        subject: Manifest | None,
        artifact_type: str | None,
        algorithm: str,
    ) -> Manifest:
        config, *layers = [descriptor_of(data, algorithm=of) for data, of in parts]
        fields = {"artifactType": artifact_type} if artifact_type else {}
        below = subject.digest if subject else None
        return self.made(image_of(config, layers, subject=below, algorithm=algorithm, **fields))

    @rule(
        target=manifests,
        children=st.lists(manifests, max_size=3),
        blobs=st.lists(contents, max_size=1),
        subject=st.none() | manifests,
        algorithm=algorithms,
    )
    def make_index(
        self, children: list[Manifest], blobs: list[bytes], subject: Manifest | None, algorithm: str
    ) -> Manifest:
        parts = [*(child.descriptor for child in children), *map(descriptor_of, blobs)]
        below = subject.digest if subject else None
        return self.made(index_of(parts, subject=below, algorithm=algorithm))

    @rule(
        repo=repos,
        manifest=manifests,
        names=st.lists(tags, max_size=3),
        sparse=st.sampled_from([False, False, True]),
    )
    def put_manifest(self, repo: RepositoryName, manifest: Manifest, names: list[Tag], sparse: bool) -> None:
        self.change(lambda registry: registry.put_manifest(repo, manifest, names, by=BY, sparse=sparse))
        self.placed.append((repo, manifest))

    @rule(repo=repos, manifest=manifests, names=st.lists(tags, max_size=2))
    def push_image(self, repo: RepositoryName, manifest: Manifest, names: list[Tag]) -> None:
        """As a client does: the blobs first."""
        self.push_blobs(repo, manifest)
        self.put_manifest(repo, manifest, names, sparse=False)

    def push_blobs(self, repo: RepositoryName, manifest: Manifest) -> None:
        wanted = {part.digest for part in manifest.blobs} | manifest.blob_children
        for data in BLOBS:
            for algorithm in ALGORITHMS:
                if digest_of(data, algorithm) in wanted:
                    self.push_blob(repo, data, algorithm)

    @rule(
        repo=repos,
        manifest=manifests,
        tag=tags,
        others=st.lists(manifests, max_size=2),
        absent=st.booleans(),
    )
    def put_manifest_if(
        self, repo: RepositoryName, manifest: Manifest, tag: Tag, others: list[Manifest], absent: bool
    ) -> None:
        condition = Condition(frozenset(other.digest for other in others), absent)
        self.change(
            lambda registry: registry.put_manifest(
                repo, manifest, [tag, TAGS[0]], by=BY, sparse=True, condition=condition
            )
        )

    @rule(repo=repos, manifest=manifests)
    def delete_manifest(self, repo: RepositoryName, manifest: Manifest) -> None:
        """Mostly one that is not there."""
        self.change(lambda registry: registry.delete_manifest(repo, manifest.digest, by=BY))

    @precondition(lambda self: self.placed)
    @rule(number=st.integers(0, 100))
    def delete_what_was_put(self, number: int) -> None:
        repo, manifest = self.placed.pop(number % len(self.placed))
        self.delete_manifest(repo, manifest)

    @precondition(lambda self: self.placed)
    @rule(number=st.integers(0, 100))
    def ask_for_its_blobs(self, number: int) -> None:
        """A client that finds a blob there relies on it for the grace period."""
        repo, manifest = self.placed[number % len(self.placed)]
        for part in manifest.blobs:
            self.resolve_blob(repo, part.digest)

    @rule(repo=repos, tag=tags)
    def delete_tag(self, repo: RepositoryName, tag: Tag) -> None:
        self.change(lambda registry: registry.delete_tag(repo, tag, by=BY))

    # Lists

    @rule(after=cursors, limit=limits, within=name_sets)
    def list_repositories(self, after: str | None, limit: int, within: NameSet) -> None:
        self.pair.ask(lambda registry: registry.repositories(after, limit, within))

    @rule(repo=repos, after=cursors, limit=limits)
    def list_tags(self, repo: RepositoryName, after: str | None, limit: int) -> None:
        self.pair.ask(lambda registry: registry.tags(repo, after, limit))

    @rule(
        repo=repos,
        subject=manifests,
        artifact_type=st.sampled_from(
            [None, "sig/x", "application/vnd.oci.image.layer.v1.tar", OCI_INDEX, OCI_MANIFEST]
        ),
        after=cursors,
        limit=limits,
    )
    def list_referrers(
        self, repo: RepositoryName, subject: Manifest, artifact_type: str | None, after: str | None, limit: int
    ) -> None:
        self.pair.ask(lambda registry: registry.referrers(repo, subject.digest, artifact_type, after, limit))

    # Time, collection, restarts

    @rule(hours=st.sampled_from([1, 5]))
    def wait(self, hours: int) -> None:
        self.now += hours * HOUR

    @rule(hours=st.sampled_from([0, 0, 1, 5]), grace=st.sampled_from([0.0, 0.5 * HOUR, 3.5 * HOUR]))
    def collect(self, hours: int, grace: float) -> None:
        """Both take the same blobs from the same repositories, and keep the same ones."""
        self.wait(hours)
        self.model.collect(grace)
        expire = 1000 * 24 * HOUR
        stored = self.stored
        parts = stored.metadata, stored.blobs, stored.partials, stored.locks
        collector = Collector(*parts, self.clock, grace, expire, leases=stored.leases)
        self.loop.run_until_complete(collector.collect())
        self.changed = True

    @rule(
        repo=repos,
        manifest=manifests,
        needed=st.sampled_from(["deleted", "asked for", "mounted", "pushed"]),
        grace=st.sampled_from([0.5 * HOUR, 3.5 * HOUR]),
    )
    def age(self, repo: RepositoryName, manifest: Manifest, needed: str, grace: float) -> None:
        """An image or its blobs grow old; then something needs the blobs once more, and they are collected in time."""
        if needed == "deleted":
            self.push_image(repo, manifest, [])
        else:
            self.push_blobs(repo, manifest)
        self.wait(5)
        if needed == "deleted":
            self.delete_manifest(repo, manifest)
        elif needed == "pushed":
            self.push_blobs(repo, manifest)
        for part in manifest.blobs:
            if needed == "asked for":
                self.resolve_blob(repo, part.digest)
            elif needed == "mounted":
                self.mount(repo, part.digest, None)
        self.collect(1, grace)

    @rule()
    def restart(self) -> None:
        """The store is closed and opened again; sessions that somebody had are there to be resumed."""
        for upload in self.held:
            self.let_go(upload)
            upload.old.clear()
        self.close()
        self.pair.both[1] = self.open()
        self.changed = True


class AgreementInObjects(Agreement):
    """The same over an object store. A layer of the model has several parts."""

    def content(self) -> OpenContent:
        return open_objects(self.data / "bucket", min_part_bytes=100)


pytestmark = pytest.mark.slow
RUNS = int(os.environ.get("ENTREPOT_MODEL_RUNS", "50"))
NIGHT = "ENTREPOT_MODEL_RUNS" in os.environ

SETTINGS = settings(
    max_examples=RUNS,
    stateful_step_count=40,
    derandomize=not NIGHT,
    database=None,
    deadline=None,
    phases=[Phase.generate, Phase.shrink] if NIGHT else [Phase.generate],
    # Each step goes to a real disk; how long that takes says nothing about the strategies.
    suppress_health_check=[HealthCheck.too_slow],
)

TestAgreement = Agreement.TestCase
TestAgreement.settings = SETTINGS
TestAgreementInObjects = AgreementInObjects.TestCase
TestAgreementInObjects.settings = SETTINGS
