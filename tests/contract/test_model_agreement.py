"""A Hypothesis test that makes the same calls in random order on the stored registry and on the reference model, and
compares their results.

With `ENTREPOT_MODEL_RUNS=2000`, the calls differ in each run, and a run takes several hours. By default, each run makes
the same calls.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, initialize, multiple, precondition, rule

from storage.composition import OpenContent
from storage.content import OCI_INDEX, OCI_MANIFEST, Condition, Manifest, Span, digest_of
from storage.names import Digest, RepositoryName, Tag
from storage.patterns import ALL_NAMES, NO_NAMES, NameSet
from storage.upkeep.collector import Collector
from tests.fakes.object_store.multipart_blob_store import open_objects
from tests.fakes.registry_content import descriptor_of, image_of, index_of

from .registry_pair import Raised, read_blob
from .upload_agreement import ALGORITHMS, BLOB_DIGESTS, BLOBS, BY, TAGS, UploadAgreement, algorithms, contents, repos

CURSORS = [None, "", "A", "a", "a/", "b", "latest", "z", "é", BLOB_DIGESTS[1], "sha256:8"]
HOUR = 3600.0  # seconds

tags = st.sampled_from(TAGS)
blob_digests = st.sampled_from(BLOB_DIGESTS)
cursors = st.sampled_from(CURSORS)
name_sets = st.sampled_from(
    [ALL_NAMES, NO_NAMES, NameSet.of(["a"]), NameSet.of(["*/b", "c/**"]), NameSet.of(["**"], ["a"])]
)
limits = st.sampled_from([1, 2, 3, 100])
spans = st.none() | st.builds(Span, st.integers(-20, 60), st.none()) | st.builds(Span, st.just(2), st.integers(0, 60))


class Agreement(UploadAgreement):
    """Makes random calls for blobs, manifests, lists and garbage collection, in addition to those for uploads."""

    manifests: Bundle[Manifest] = Bundle("manifests")

    def __init__(self) -> None:
        super().__init__()
        self.placed: list[tuple[RepositoryName, Manifest]] = []
        """The repository and the manifest of each call of `put_manifest`, also of refused calls."""

    # Blobs

    @rule(repo=repos, digest=blob_digests, source=name_sets | repos)
    def mount(self, repo: RepositoryName, digest: Digest, source: RepositoryName | NameSet) -> None:
        self.mount_from(source, repo, digest)

    def mount_from(self, source: RepositoryName | NameSet, repo: RepositoryName, digest: Digest) -> Any:
        """Mounts a blob in `repo`. Returns the common result of both registries, which may be an error."""
        return self.change(lambda registry: registry.mount_blob(repo, digest, source, BY))

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

    def remember_digest(self, manifest: Manifest) -> Manifest:
        """Adds the digest of a new manifest to those that are compared, and returns the manifest."""
        self.known.add(manifest.digest)
        return manifest

    @initialize(target=manifests)
    def first_manifests(self) -> Any:
        config, layer = descriptor_of(BLOBS[1]), descriptor_of(BLOBS[2])
        image = self.remember_digest(image_of(config, [layer]))
        return multiple(image, self.remember_digest(index_of([image.descriptor])), self.remember_digest(index_of([])))

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
        config, *layers = [descriptor_of(data, algorithm=part_algorithm) for data, part_algorithm in parts]
        fields = {"artifactType": artifact_type} if artifact_type else {}
        subject_digest = subject.digest if subject else None
        return self.remember_digest(image_of(config, layers, subject=subject_digest, algorithm=algorithm, **fields))

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
        subject_digest = subject.digest if subject else None
        return self.remember_digest(index_of(parts, subject=subject_digest, algorithm=algorithm))

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
        """Pushes the blobs of a manifest and then the manifest, as a client does."""
        self.push_blobs(repo, manifest)
        self.put_manifest(repo, manifest, names, sparse=False)

    def push_blobs(self, repo: RepositoryName, manifest: Manifest) -> None:
        needed_digests = {part.digest for part in manifest.blobs} | manifest.blob_children
        for data in BLOBS:
            for algorithm in ALGORITHMS:
                if digest_of(data, algorithm) in needed_digests:
                    self.push_blob(repo, data, algorithm)

    @rule(
        repo=repos,
        manifest=manifests,
        tag=tags,
        condition_manifests=st.lists(manifests, max_size=2),
        negated=st.booleans(),
    )
    def put_manifest_if(
        self, repo: RepositoryName, manifest: Manifest, tag: Tag, condition_manifests: list[Manifest], negated: bool
    ) -> None:
        """Puts a manifest on the condition that its tag points at one of `condition_manifests`, or at none of them."""
        condition = Condition(frozenset(each.digest for each in condition_manifests), negated)
        self.change(
            lambda registry: registry.put_manifest(
                repo, manifest, [tag, TAGS[0]], by=BY, sparse=True, condition=condition
            )
        )

    @rule(repo=repos, manifest=manifests)
    def delete_manifest(self, repo: RepositoryName, manifest: Manifest) -> None:
        """Deletes a manifest, which in most cases does not exist."""
        self.change(lambda registry: registry.delete_manifest(repo, manifest.digest, by=BY))

    @precondition(lambda self: self.placed)
    @rule(number=st.integers(0, 100))
    def delete_what_was_put(self, number: int) -> None:
        """Deletes a manifest that a call has put, so that most of these deletes find their manifest."""
        repo, manifest = self.placed.pop(number % len(self.placed))
        self.delete_manifest(repo, manifest)

    @precondition(lambda self: self.placed)
    @rule(number=st.integers(0, 100))
    def ask_for_its_blobs(self, number: int) -> None:
        """Looks up the blobs of a manifest of `placed`. Garbage collection then keeps them for the grace period,
        because a client relies on a blob that it has found."""
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

    # Time and collection

    @rule(hours=st.sampled_from([1, 5]))
    def wait(self, hours: int) -> None:
        self.now += hours * HOUR

    @rule(hours=st.sampled_from([0, 0, 1, 5]), grace=st.sampled_from([0.0, 0.5 * HOUR, 3.5 * HOUR]))
    def collect(self, hours: int, grace: float) -> None:
        """Runs a garbage collection on both registries. They must remove the same blobs from the same repositories."""
        self.wait(hours)
        self.model.collect(grace)
        expire = 1000 * 24 * HOUR  # no upload session expires during the test
        stored = self.stored
        parts = stored.metadata, stored.blobs, stored.partials, stored.locks
        collector = Collector(*parts, self.clock, grace, expire, leases=stored.leases)
        self.loop.run_until_complete(collector.collect())
        self.changed = True  # so the two registries are compared

    @rule(
        repo=repos,
        manifest=manifests,
        last_use=st.sampled_from(["deleted", "asked for", "mounted", "pushed"]),
        grace=st.sampled_from([0.5 * HOUR, 3.5 * HOUR]),
    )
    def age(self, repo: RepositoryName, manifest: Manifest, last_use: str, grace: float) -> None:
        """Lets the blobs of an image grow old, uses them once more as `last_use` says, and runs a garbage collection.
        The grace period counts from that use."""
        if last_use == "deleted":
            self.push_image(repo, manifest, [])
        else:
            self.push_blobs(repo, manifest)
        self.wait(5)
        if last_use == "deleted":
            self.delete_manifest(repo, manifest)
        elif last_use == "pushed":
            self.push_blobs(repo, manifest)
        for part in manifest.blobs:
            if last_use == "asked for":
                self.resolve_blob(repo, part.digest)
            elif last_use == "mounted":
                # Mounts the blob from any repository into `repo`, which has it already. So the mount finds a source,
                # and renews the link between `repo` and the blob.
                assert not isinstance(self.mount_from(ALL_NAMES, repo, part.digest), Raised)
        self.collect(1, grace)


class AgreementInObjects(Agreement):
    """The same test with blobs in an object store. Parts are small, so that a layer has several parts."""

    def content(self) -> OpenContent:
        return open_objects(self.data / "bucket", min_part_bytes=100)


pytestmark = pytest.mark.slow
RUNS = int(os.environ.get("ENTREPOT_MODEL_RUNS", "50"))
IS_LONG_RUN = "ENTREPOT_MODEL_RUNS" in os.environ

SETTINGS = settings(
    max_examples=RUNS,
    stateful_step_count=40,
    derandomize=not IS_LONG_RUN,
    database=None,
    deadline=None,
    phases=[Phase.generate, Phase.shrink] if IS_LONG_RUN else [Phase.generate],
    # Each step goes to a real disk; how long that takes says nothing about the strategies.
    suppress_health_check=[HealthCheck.too_slow],
)

TestAgreement = Agreement.TestCase
TestAgreement.settings = SETTINGS
TestAgreementInObjects = AgreementInObjects.TestCase
TestAgreementInObjects.settings = SETTINGS
