"""A Hypothesis state machine that makes the same random uploads and restarts on the stored registry and on the
reference model, and compares their results."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from storage.composition import OpenContent, open_file_stores, open_registry, prepare_data_dir
from storage.content import Actor, digest_of
from storage.interface import Registry
from storage.memory_registry import MemoryRegistry
from storage.names import Digest, RepositoryName, Tag, UploadID
from storage.store.stored_registry import StoredRegistry
from tests.fakes.temporary_files import memory_root

from .registry_pair import Raised, RegistryPair, UploadPair

BY = Actor("model")
REPOS = [RepositoryName(name) for name in ("a", "a/b")]
TAGS = [Tag(name) for name in ("latest", "v1", "Z")]
BLOBS = [b"", b"config", b"layer" * 50]
ALGORITHMS = ["sha256", "sha512"]
BLOB_DIGESTS = [digest_of(data, algorithm) for data in BLOBS for algorithm in ALGORITHMS]
UNKNOWN = digest_of(b"nobody has this")

repos = st.sampled_from(REPOS)
contents = st.sampled_from(BLOBS)
algorithms = st.sampled_from(["sha256", "sha256", "sha256", "sha512"])
actors = st.sampled_from([None, BY, Actor("somebody else")])


class UploadAgreement(RuleBasedStateMachine):
    """Makes the same random calls for uploads on both registries. Each rule compares their results. The clock stands
    still except in rules that move it."""

    uploads: Bundle[UploadPair] = Bundle("uploads")

    def __init__(self) -> None:
        super().__init__()
        self.now = 1_000_000.0
        self.known: set[Digest] = {UNKNOWN, *BLOB_DIGESTS}
        """The digests whose blobs, manifests and referrers are compared."""
        self.loop = asyncio.new_event_loop()
        self.directory = tempfile.TemporaryDirectory(dir=memory_root())
        self.data = Path(self.directory.name) / "data"
        prepare_data_dir(self.data)
        self.model = MemoryRegistry(self.clock)
        self.pair = RegistryPair(self.loop, self.model, self.open())
        self.all_uploads: list[UploadPair] = []
        self.changed = False
        """A rule has changed the content since the last comparison."""

    @invariant()
    def registries_agree(self) -> None:
        """Checks after each change that both registries have the same content."""
        if self.changed:
            self.changed = False
            self.pair.compare_all(REPOS, sorted(self.known), TAGS)

    def change(self, call: Callable[[Registry], Awaitable[Any]]) -> Any:
        self.changed = True
        return self.pair.ask(call)

    def clock(self) -> float:
        return self.now

    def content(self) -> OpenContent:
        """Returns the function that opens the store for the bytes of blobs."""
        return open_file_stores

    def open(self) -> StoredRegistry:
        self.opened: AbstractAsyncContextManager[StoredRegistry] = open_registry(
            self.data, clock=self.clock, open_content=self.content()
        )
        self.stored = self.loop.run_until_complete(self.opened.__aenter__())
        return self.stored

    def close(self) -> None:
        self.loop.run_until_complete(self.opened.__aexit__(None, None, None))

    def teardown(self) -> None:
        """Restarts the stored registry at the end, and checks that both registries have the same content."""
        try:
            self.restart()
            self.registries_agree()
        finally:
            for upload in self.all_uploads:
                for writers in upload.lost_writers:
                    self.loop.run_until_complete(self.drop(writers))
            self.close()
            self.loop.close()
            self.directory.cleanup()

    @staticmethod
    async def drop(writers: list[Any]) -> None:
        for writer in writers:
            await asyncio.gather(writer.aclose(), return_exceptions=True)

    # Uploads

    @rule(target=uploads, repo=repos, algorithm=algorithms, by=actors)
    def start(self, repo: RepositoryName, algorithm: str, by: Actor | None) -> UploadPair:
        return self.begin(repo, algorithm, by)

    def begin(self, repo: RepositoryName, algorithm: str, by: Actor | None = None) -> UploadPair:
        writers = self.pair.get([registry.start_upload(repo, algorithm, by=by) for registry in self.pair.both])
        upload = UploadPair(repo, [writer.id for writer in writers], writers)
        self.all_uploads.append(upload)
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
            upload.accepted += data
        assert [writer.offset for writer in upload.writers] == [len(upload.accepted)] * 2

    @rule(upload=uploads, start=st.integers(0, 20), length=st.integers(0, 1000))
    def read_at(self, upload: UploadPair, start: int, length: int) -> None:
        if upload.writers is not None:
            read = self.pair.compare([writer.read_at(start, length) for writer in upload.writers])
            assert read == upload.accepted[start : start + length]

    @rule(upload=uploads)
    def let_go(self, upload: UploadPair) -> None:
        """Closes the writers of a session. The session stays open, and another request can resume it."""
        if upload.writers is not None:
            self.pair.compare([writer.aclose() for writer in upload.writers])
            upload.lost_writers.append(upload.writers)
            upload.writers = None

    @rule(upload=uploads, offset_kind=st.sampled_from(["right", "right", "none", "wrong"]))
    def resume(self, upload: UploadPair, offset_kind: str) -> None:
        """Resumes the session as another request would. `offset_kind`: which offset the request states. The writer that
        owned the session loses it."""
        self.flush_writers(upload)
        offset = {"right": len(upload.accepted), "none": None, "wrong": len(upload.accepted) + 1}[offset_kind]
        resumed = self.pair.get(
            [
                registry.resume_upload(upload.repo, upload_id, offset)
                for registry, upload_id in zip(self.pair.both, upload.ids, strict=True)
            ]
        )
        if resumed:
            assert [writer.offset for writer in resumed] == [len(upload.accepted)] * 2
            if upload.writers is not None:
                upload.lost_writers.append(upload.writers)
            upload.writers = resumed

    def flush_writers(self, upload: UploadPair) -> None:
        """Makes both writers store the bytes that they have buffered: a read has this effect."""
        if upload.writers is not None:
            self.pair.compare([writer.read_at(0, 0) for writer in upload.writers])

    @rule(upload=uploads)
    def status(self, upload: UploadPair) -> None:
        self.flush_writers(upload)
        self.ask_status(upload)

    def ask_status(self, upload: UploadPair) -> Any:
        return self.pair.compare(
            [
                registry.upload_offset(upload.repo, upload_id)
                for registry, upload_id in zip(self.pair.both, upload.ids, strict=True)
            ]
        )

    @rule(upload=uploads, repo=repos)
    def ask_for_it_elsewhere(self, upload: UploadPair, repo: RepositoryName) -> None:
        """Requests the session through a repository to which it does not belong. Both calls must fail."""
        if repo != upload.repo:
            pairs = list(zip(self.pair.both, upload.ids, strict=True))
            assert isinstance(self.pair.compare([registry.upload_offset(repo, n) for registry, n in pairs]), Raised)
            assert isinstance(self.pair.compare([registry.resume_upload(repo, n) for registry, n in pairs]), Raised)

    @rule(upload=uploads, by=actors)
    def ask_for_it_as(self, upload: UploadPair, by: Actor | None) -> None:
        """Requests the session as the account `by`, at a wrong offset. The writer that owns the session must keep it,
        whichever account sends the request."""
        self.flush_writers(upload)
        pairs = list(zip(self.pair.both, upload.ids, strict=True))
        self.pair.compare([registry.upload_offset(upload.repo, upload_id, by=by) for registry, upload_id in pairs])
        wrong_offset = len(upload.accepted) + 1
        answer = self.pair.compare(
            [registry.resume_upload(upload.repo, upload_id, wrong_offset, by=by) for registry, upload_id in pairs]
        )
        assert isinstance(answer, Raised)

    @rule(upload=uploads, algorithm=algorithms, right=st.sampled_from([True, True, True, False]))
    def commit(self, upload: UploadPair, algorithm: str, right: bool) -> None:
        if upload.writers is not None:
            digest = digest_of(upload.accepted if right else upload.accepted + b"?", algorithm)
            self.known.add(digest)
            self.end(upload, [writer.commit(digest) for writer in upload.writers])

    @rule(repo=repos, data=contents, algorithm=algorithms)
    def commit_wrongly(self, repo: RepositoryName, data: bytes, algorithm: str) -> None:
        """Commits bytes that do not match the digest. Both registries must discard them."""
        upload = self.begin(repo, "sha256")
        self.write(upload, data + b"broken")
        self.end(upload, [writer.commit(digest_of(data, algorithm)) for writer in upload.writers or ()])

    @rule(repo=repos, data=contents, call=st.sampled_from(["write", "commit", "read_at"]))
    def take_over(self, repo: RepositoryName, data: bytes, call: str) -> None:
        """Starts a push, resumes it as another request while the first writer is still open, and ends the push with the
        new writer."""
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
        """Ends a session with `calls`, a commit or a cancel. Afterwards the session is unknown."""
        self.changed = True
        self.pair.compare(calls)
        assert isinstance(self.ask_status(upload), Raised)
        writers, upload.writers = upload.writers, None
        if writers is not None:
            self.pair.compare([writer.aclose() for writer in writers])
            upload.lost_writers.append(writers)

    @rule(upload=uploads, call=st.sampled_from(["write", "commit", "read_at"]))
    def try_what_was_lost(self, upload: UploadPair, call: str) -> None:
        """Calls a writer that has lost or closed its session. Every call must fail."""
        for writers in upload.lost_writers[-1:]:  # the latest pair, if there is one
            calls: dict[str, Callable[[Any], Awaitable[Any]]] = {
                "write": lambda writer: self.write_and_close(writer),
                "read_at": lambda writer: writer.read_at(0, 1),
                "commit": lambda writer: writer.commit(digest_of(upload.accepted)),
            }
            assert isinstance(self.pair.compare([calls[call](writer) for writer in writers]), Raised)

    @staticmethod
    async def write_and_close(writer: Any) -> None:
        await writer.write(b"too late")
        await writer.aclose()

    @rule(repo=repos)
    def resume_nothing(self, repo: RepositoryName) -> None:
        """Resumes a session that never existed. Both calls must fail."""
        unknown = UploadID.random()
        assert isinstance(self.pair.ask(lambda registry: registry.resume_upload(repo, unknown)), Raised)
        assert isinstance(self.pair.ask(lambda registry: registry.upload_offset(repo, unknown)), Raised)

    @rule()
    def restart(self) -> None:
        """Closes the stored registry and opens it again. Open sessions can be resumed afterwards."""
        for upload in self.all_uploads:
            self.let_go(upload)
            upload.lost_writers.clear()
        self.close()
        self.pair.both[1] = self.open()
        self.changed = True
