"""The router decides which registry answers a call for a repository name: the hosted registry, to which clients push,
or the mirror of an upstream. It refuses pushes to mirrored names."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing

import pytest

from registry.naming import NamingRules
from registry.request import UNRESTRICTED, RequestContext, enter_request
from registry.router import MAX_NESTED_INDEXES, Router
from storage.content import OCI_MANIFEST, Descriptor, Manifest, Page, Span
from storage.errors import BlobUnknown, Denied, ManifestBlobUnknown, ManifestUnknown, NameUnknown, UpstreamUnavailable
from storage.interface import Registry
from storage.memory_blob_reader import MemoryBlobReader
from storage.memory_registry import MemoryRegistry
from storage.names import Digest, Reference, RepositoryName, Tag
from storage.patterns import ALL_NAMES
from tests.fakes.registry_content import (
    BY,
    NOWHERE,
    descriptor_of,
    image_of,
    index_of,
    push_blob,
    push_image,
    read_blob,
)

LATEST = Tag("latest")
HOSTED_PATTERNS = ("team/**", "own-*", "one/app")


class RecordingMirror(MemoryRegistry):
    """A mirror that has all content of its upstream, under stored names such as `docker.io/library/ubuntu`.
    `requested_repos`: the repositories of all calls. `down`: whether the upstream does not answer."""

    def __init__(self) -> None:
        super().__init__()
        self.requested_repos: list[str] = []
        self.down = False

    async def resolve_blob(self, repo: RepositoryName, digest: Digest) -> Descriptor:
        self._record_call(repo)
        return await super().resolve_blob(repo, digest)

    async def get_manifest(self, repo: RepositoryName, reference: Reference) -> Manifest:
        self._record_call(repo)
        return await super().get_manifest(repo, reference)

    async def tags(self, repo: RepositoryName, after: str | None, limit: int) -> Page[Tag]:
        self._record_call(repo)
        return await super().tags(repo, after, limit)

    def _record_call(self, repo: RepositoryName) -> None:
        self.requested_repos.append(repo)
        if self.down:
            raise UpstreamUnavailable


class FillingMirror(RecordingMirror):
    """A mirror that stores each blob that clients read in `local`, the store that the mirror shares with the hosted
    registry."""

    def __init__(self, local: MemoryRegistry) -> None:
        super().__init__()
        self._local = local

    async def open_blob(self, repo: RepositoryName, digest: Digest, span: Span | None = None) -> MemoryBlobReader:
        self._record_call(repo)
        async with aclosing(await super().open_blob(repo, digest)) as reader:
            self._local.add_blob(repo, digest, b"".join([data async for data in reader]))
        return await self._local.open_blob(repo, digest, span)


class RouterSetup:
    """A router in front of the hosted registry and of the mirrors of docker.io (`hub`) and ghcr.io."""

    def __init__(self, default: str | None = "docker.io", prefixes: Sequence[str] = HOSTED_PATTERNS) -> None:
        self.hosted = MemoryRegistry()
        self.hub, self.ghcr = FillingMirror(self.hosted), RecordingMirror()
        self.known_lookups = 0
        mirrors = {"docker.io": self.hub, "ghcr.io": self.ghcr}
        self.router = Router(
            self.hosted, mirrors, self._is_known, NamingRules(mirrors, default=default, always_hosted=prefixes)
        )

    async def _is_known(self, repo: RepositoryName) -> bool:
        self.known_lookups += 1
        try:
            await self.hosted.tags(repo, None, 1)
        except NameUnknown:
            return False
        return True

    def name_of(self, registry: Registry) -> str:
        return {id(self.hosted): "hosted", id(self.hub): "hub", id(self.ghcr): "ghcr"}[id(registry)]

    async def destination(self, name: str) -> tuple[str, str]:
        """Returns the registry that answers reads of this name, and the stored name."""
        location = await self.router.locate(RepositoryName(name))
        return self.name_of(location.registry), location.repo


@pytest.fixture(autouse=True)
async def request_without_accounts() -> None:
    """Makes the current request a request to a registry without accounts, in which everything is allowed."""
    enter_request(RequestContext(UNRESTRICTED))


@pytest.fixture
def router_setup() -> RouterSetup:
    return RouterSetup()


DESTINATIONS = [
    ("ubuntu", "hub", "docker.io/library/ubuntu"),
    ("library/ubuntu", "hub", "docker.io/library/ubuntu"),
    ("docker.io/ubuntu", "hub", "docker.io/library/ubuntu"),
    ("docker.io/library/ubuntu", "hub", "docker.io/library/ubuntu"),
    ("someone/app", "hub", "docker.io/someone/app"),
    ("docker.io/someone/app", "hub", "docker.io/someone/app"),
    ("ghcr.io/org/app", "ghcr", "ghcr.io/org/app"),
    ("ghcr.io/app", "ghcr", "ghcr.io/app"),
    ("docker.io/team/app", "hub", "docker.io/team/app"),
    ("team/app", "hosted", "team/app"),
    ("team/deep/er/app", "hosted", "team/deep/er/app"),
    ("teams/app", "hub", "docker.io/teams/app"),
    ("team", "hub", "docker.io/library/team"),
    ("own-tool", "hosted", "own-tool"),
    ("own-tool/part", "hub", "docker.io/own-tool/part"),
    ("one/app", "hosted", "one/app"),
    ("one/app/more", "hub", "docker.io/one/app/more"),
    ("quay.io/org/app", "hosted", "quay.io/org/app"),
    ("localhost/app", "hosted", "localhost/app"),
    ("ghcr.iox/app", "hosted", "ghcr.iox/app"),
]


@pytest.mark.parametrize(("name", "registry", "stored"), DESTINATIONS)
async def test_destination_of_reads(router_setup: RouterSetup, name: str, registry: str, stored: str) -> None:
    """The default upstream is docker.io, and ghcr.io is mirrored as well. Each form of a name leads to one registry and
    one stored name. A name with the host of a registry that is not mirrored is hosted."""
    assert await router_setup.destination(name) == (registry, stored)


@pytest.mark.parametrize("name", ["ubuntu", "library/ubuntu", "someone/app", "quay.io/org/app", "team/app"])
async def test_without_a_default_upstream_names_without_a_host_are_hosted(name: str) -> None:
    """Without a default upstream, names without a host are hosted. Names with the host of an upstream are still
    mirrored."""
    router_setup = RouterSetup(default=None)
    assert await router_setup.destination(name) == ("hosted", name)
    assert await router_setup.destination("docker.io/ubuntu") == ("hub", "docker.io/library/ubuntu")
    await push_image(router_setup.router, RepositoryName(name), "x", "latest")


async def test_library_is_added_for_docker_hub_only() -> None:
    """For Docker Hub, `library/` is added to a name of one part. With another default upstream, only the upstream's
    name is added."""
    router_setup = RouterSetup(default="ghcr.io")
    assert await router_setup.destination("app") == ("ghcr", "ghcr.io/app")
    assert await router_setup.destination("library/app") == ("ghcr", "ghcr.io/library/app")
    assert await router_setup.destination("docker.io/app") == ("hub", "docker.io/library/app")


@pytest.mark.parametrize("name", ["a" * 255, "a/" + "b" * 253])
async def test_a_name_too_long_to_be_mirrored_is_hosted(router_setup: RouterSetup, name: str) -> None:
    """If a name would be too long with the upstream's name in front of it, the name is hosted and can be pushed."""
    assert await router_setup.destination(name) == ("hosted", name)
    await push_image(router_setup.router, RepositoryName(name), "x", "latest")


@pytest.mark.parametrize("name", ["docker.io", "ghcr.io"])
async def test_the_name_of_an_upstream_is_no_repository(router_setup: RouterSetup, name: str) -> None:
    """A repository name that consists only of an upstream's name is unknown, and pushes to it are refused."""
    with pytest.raises(NameUnknown, match=f"pull {name}/NAME"):
        await router_setup.router.get_manifest(RepositoryName(name), LATEST)
    with pytest.raises(Denied):
        await router_setup.router.start_upload(RepositoryName(name))


MIRRORED_NAMES = ["library/ubuntu", "docker.io/ubuntu", "docker.io/team/app", "ghcr.io/org/app", "library/a/b"]


@pytest.mark.parametrize("name", MIRRORED_NAMES)
async def test_pushes_to_mirrored_names_are_denied(router_setup: RouterSetup, name: str) -> None:
    """Every call that writes to a mirrored name is denied. The error names the upstream and says what to do. The calls
    do not reach a registry."""
    repo, router = RepositoryName(name), router_setup.router
    upload = (await router_setup.hosted.start_upload(repo)).id
    blob = await push_blob(router_setup.hosted, NOWHERE, b"x")
    for call in (
        router.start_upload(repo),
        router.resume_upload(repo, upload),
        router.upload_offset(repo, upload),
        router.mount_blob(repo, blob.digest, NOWHERE, BY),
        router.put_manifest(repo, image_of(blob), [LATEST], by=BY),
    ):
        with pytest.raises(Denied, match=r"is mirrored from (docker|ghcr)\.io and takes no pushes; push under"):
            await call
    with pytest.raises(NameUnknown):
        await router_setup.hosted.tags(repo, None, 1)


@pytest.mark.parametrize("name", ["myapp", "someone/app", "team/app", "quay.io/org/app"])
async def test_a_pushed_name_stays_hosted(router_setup: RouterSetup, name: str) -> None:
    """After the first push of a blob to a name, the name is hosted for good. The upstream is not asked for tags,
    digests or lists of this name, even if it has such a repository, and even after all hosted content was deleted."""
    repo, router = RepositoryName(name), router_setup.router
    upstream_image = await push_image(
        router_setup.hub, RepositoryName(f"docker.io/{name}"), "theirs", "latest", "only-there"
    )
    hosted_image = await push_image(router, repo, "ours", "latest")
    assert await router_setup.destination(name) == ("hosted", name)
    router_setup.hub.requested_repos.clear()
    assert (await router.get_manifest(repo, LATEST)).digest == hosted_image.digest
    for reference in (Tag("only-there"), upstream_image.digest):
        with pytest.raises(ManifestUnknown):
            await router.get_manifest(repo, reference)
    with pytest.raises(BlobUnknown):
        await router.resolve_blob(repo, upstream_image.blobs[0].digest)
    assert list((await router.tags(repo, None, 10)).items) == ["latest"]
    await router.delete_manifest(repo, hosted_image.digest, by=BY)
    with pytest.raises(ManifestUnknown):
        await router.get_manifest(repo, LATEST)
    assert list((await router.tags(repo, None, 10)).items) == []
    assert router_setup.hub.requested_repos == []


async def test_a_hosted_name_of_one_part_does_not_change_library_names(router_setup: RouterSetup) -> None:
    """After a push to `myapp`, this name is hosted. The names `library/myapp` and `docker.io/myapp` still mean the
    repository of Docker Hub."""
    await push_image(router_setup.router, RepositoryName("myapp"), "ours", "latest")
    upstream_image = await push_image(router_setup.hub, RepositoryName("docker.io/library/myapp"), "theirs", "latest")
    for name in ("library/myapp", "docker.io/myapp"):
        assert (await router_setup.router.get_manifest(RepositoryName(name), LATEST)).digest == upstream_image.digest


async def test_a_push_by_another_process_counts_at_once(router_setup: RouterSetup) -> None:
    """The router caches only that content was pushed to a name, not the opposite. So after a push by another process,
    the next call finds that the name is hosted."""
    repo = RepositoryName("someone/app")
    assert await router_setup.destination(repo) == ("hub", "docker.io/someone/app")
    await push_blob(router_setup.hosted, repo, b"from another worker")
    assert await router_setup.destination(repo) == ("hosted", repo)
    lookups_before = router_setup.known_lookups
    assert await router_setup.destination(repo) == ("hosted", repo)
    assert router_setup.known_lookups == lookups_before


async def test_a_name_that_matches_a_hosted_pattern_is_not_looked_up(router_setup: RouterSetup) -> None:
    """If a name matches a pattern of hosted names, neither the upstream nor the store is asked whether it is hosted."""
    with pytest.raises(ManifestUnknown):
        await router_setup.router.get_manifest(RepositoryName("team/app"), LATEST)
    assert (router_setup.hub.requested_repos, router_setup.known_lookups) == ([], 0)


async def test_a_name_that_was_mirrored_becomes_hosted_by_a_push(router_setup: RouterSetup) -> None:
    """A name without a host that was read from the default upstream can be pushed to, and is hosted after that. The
    mirrored content can still be read under its stored name."""
    repo = RepositoryName("someone/app")
    upstream_image = await push_image(router_setup.hub, RepositoryName("docker.io/someone/app"), "theirs", "latest")
    assert (await router_setup.router.get_manifest(repo, LATEST)).digest == upstream_image.digest
    hosted_image = await push_image(router_setup.router, repo, "ours", "latest")
    assert (await router_setup.router.get_manifest(repo, LATEST)).digest == hosted_image.digest
    mirrored_repo = RepositoryName("docker.io/someone/app")
    assert (await router_setup.router.get_manifest(mirrored_repo, LATEST)).digest == upstream_image.digest


@pytest.mark.parametrize("name", ["ubuntu", "library/ubuntu", "docker.io/ubuntu", "docker.io/library/ubuntu"])
async def test_deletes_of_mirrored_names_go_to_the_mirror(router_setup: RouterSetup, name: str) -> None:
    """A delete under any form of a mirrored name deletes the content that the mirror has cached."""
    stored, repo = RepositoryName("docker.io/library/ubuntu"), RepositoryName(name)
    image = await push_image(router_setup.hub, stored, "x", "latest", "other")
    await router_setup.router.delete_tag(repo, Tag("other"), by=BY)
    await router_setup.router.delete_manifest(repo, image.digest, by=BY)
    await router_setup.router.delete_blob(repo, image.blobs[0].digest, by=BY)
    with pytest.raises(ManifestUnknown):
        await router_setup.hub.get_manifest(stored, LATEST)


async def test_lists_come_from_the_registry_of_the_name(router_setup: RouterSetup) -> None:
    """The registry to which a name leads lists its tags and referrers. The list of repositories has the stored names of
    hosted and cached repositories."""
    stored = RepositoryName("docker.io/library/ubuntu")
    image = await push_image(router_setup.hub, stored, "x", "22.04")
    await push_image(router_setup.hub, stored, "signature", subject=image.digest)
    assert list((await router_setup.router.tags(RepositoryName("ubuntu"), None, 10)).items) == ["22.04"]
    page = await router_setup.router.referrers(RepositoryName("ubuntu"), image.digest, None, None, 10)
    assert len(page.items) == 1
    await push_image(router_setup.hosted, stored, "kept by the mirror", "22.04")
    await push_image(router_setup.router, RepositoryName("team/app"), "y", "1")
    assert list((await router_setup.router.repositories(None, 10)).items) == [stored, "team/app"]


@pytest.mark.parametrize("source", ["ubuntu", "library/ubuntu", "docker.io/ubuntu", None])
async def test_mounts_from_a_mirrored_name(router_setup: RouterSetup, source: str | None) -> None:
    """The source of a mount may be any form of a mirrored name. If the store has the blob under this name, it is
    mounted into the hosted repository."""
    blob = await push_blob(router_setup.hosted, RepositoryName("docker.io/library/ubuntu"), b"a layer")
    repo = RepositoryName("team/app")
    await router_setup.router.mount_blob(repo, blob.digest, RepositoryName(source) if source else ALL_NAMES, BY)
    assert await read_blob(router_setup.router, repo, blob.digest) == b"a layer"


async def test_a_mount_fetches_nothing(router_setup: RouterSetup) -> None:
    """If the mirror would have to fetch a blob from the upstream, the blob is not mounted, so the client uploads it."""
    blob = await push_blob(router_setup.hub, RepositoryName("docker.io/library/ubuntu"), b"a layer")
    with pytest.raises(BlobUnknown):
        await router_setup.router.mount_blob(RepositoryName("team/app"), blob.digest, RepositoryName("ubuntu"), BY)
    assert router_setup.hub.requested_repos == []


async def test_a_push_of_blobs_that_the_mirror_has_reported(router_setup: RouterSetup) -> None:
    """Before a push, a client asks which blobs exist. If the mirror answers that they exist, the client does not upload
    them. The pushed manifest is accepted, and the blobs are copied into the hosted repository. Only blobs that are not
    stored yet are fetched."""
    mirrored_repo, repo = RepositoryName("docker.io/someone/app"), RepositoryName("someone/app")
    config, layer = (
        await push_blob(router_setup.hub, mirrored_repo, b"{}"),
        await push_blob(router_setup.hub, mirrored_repo, b"layer"),
    )
    router_setup.hosted.add_blob(mirrored_repo, layer.digest, b"layer")  # this blob was pulled before
    for blob in (config, layer):
        assert (await router_setup.router.resolve_blob(repo, blob.digest)).size == blob.size
    router_setup.hub.requested_repos.clear()
    await router_setup.router.put_manifest(repo, image_of(config, [layer]), [LATEST], by=BY)
    assert len(router_setup.hub.requested_repos) == 1
    assert await read_blob(router_setup.router, repo, config.digest) == b"{}"
    assert await read_blob(router_setup.router, repo, layer.digest) == b"layer"
    assert await router_setup.destination(repo) == ("hosted", repo)


async def test_a_push_of_an_index_whose_manifests_the_mirror_has(router_setup: RouterSetup) -> None:
    """If a pushed index lists manifests that only the mirror has, they are copied into the hosted repository with their
    blobs."""
    mirrored_repo, repo = RepositoryName("docker.io/library/tool"), RepositoryName("tool")
    child = await push_image(router_setup.hub, mirrored_repo, "child", "latest")
    router_setup.hosted.add_blob(
        mirrored_repo, child.blobs[0].digest, await read_blob(router_setup.hub, mirrored_repo, child.blobs[0].digest)
    )
    index = index_of([Descriptor(OCI_MANIFEST, child.digest, len(child.body))])
    await router_setup.router.put_manifest(repo, index, [LATEST], by=BY)
    assert (await router_setup.hosted.get_manifest(repo, child.digest)).body == child.body
    for blob in child.blobs:
        await read_blob(router_setup.hosted, repo, blob.digest)


@pytest.mark.parametrize(("levels", "is_copied"), [(MAX_NESTED_INDEXES, True), (MAX_NESTED_INDEXES + 1, False)])
async def test_indexes_in_indexes_are_copied_to_a_limited_depth(
    router_setup: RouterSetup, levels: int, is_copied: bool
) -> None:
    """A pushed index begins a chain of indexes that only the mirror has. If the chain is too long, the push is refused
    as if the content could not be fetched, and the upstream is asked for a limited number of manifests."""
    mirrored_repo, repo = RepositoryName("docker.io/library/tool"), RepositoryName("tool")
    pushed = index_of([])
    for _ in range(levels):
        await router_setup.hub.put_manifest(mirrored_repo, pushed, by=BY)
        pushed = index_of([pushed.descriptor])
    router_setup.hosted.add_blob(mirrored_repo, descriptor_of(b"x").digest, b"x")  # this blob was pulled before
    push = router_setup.router.put_manifest(repo, pushed, [LATEST], by=BY)
    if is_copied:
        await push
        assert (await router_setup.hosted.get_manifest(repo, LATEST)).body == pushed.body
    else:
        with pytest.raises(ManifestBlobUnknown):
            await push
    assert len(router_setup.hub.requested_repos) == MAX_NESTED_INDEXES


async def test_a_hosted_name_uses_only_stored_blobs(router_setup: RouterSetup) -> None:
    """After the first push of a blob to a name, the upstream is not asked for the other blobs of a manifest. Blobs that
    the store has are mounted. If another blob is missing, the manifest is refused."""
    mirrored_repo, repo = RepositoryName("docker.io/someone/app"), RepositoryName("someone/app")
    stored_blob, upstream_blob = (
        await push_blob(router_setup.hosted, mirrored_repo, b"here"),
        await push_blob(router_setup.hub, mirrored_repo, b"far"),
    )
    pushed = await push_blob(router_setup.router, repo, b"pushed")
    await router_setup.router.put_manifest(repo, image_of(pushed, [stored_blob]), by=BY)
    with pytest.raises(ManifestBlobUnknown):
        await router_setup.router.put_manifest(repo, image_of(pushed, [upstream_blob]), by=BY)
    assert router_setup.hub.requested_repos == []


@pytest.mark.parametrize("name", ["team/app", "quay.io/org/app"])
async def test_a_name_that_was_never_pulled_uses_no_upstream_blobs(router_setup: RouterSetup, name: str) -> None:
    """If nothing was pulled under a name, a pushed manifest needs all its blobs in the hosted repository, even if the
    store has them for the mirrored repository of the same name."""
    blob = await push_blob(router_setup.hosted, RepositoryName(f"docker.io/{name}"), b"theirs")
    with pytest.raises(ManifestBlobUnknown):
        await router_setup.router.put_manifest(RepositoryName(name), image_of(blob), by=BY)
    assert router_setup.hub.requested_repos == []


async def test_a_push_to_a_new_name_does_not_ask_the_upstream(router_setup: RouterSetup) -> None:
    """If nothing was pulled under a name, a push does not ask the upstream which blobs exist. So pushes work while the
    upstream is down, and the upstream learns no private names. Pulls ask the upstream."""
    router_setup.hub.down = True
    repo = RepositoryName("someone/app")
    blob = await push_blob(router_setup.hub, RepositoryName("docker.io/someone/app"), b"x")
    with pytest.raises(BlobUnknown):
        await router_setup.router.resolve_blob(repo, blob.digest)
    with pytest.raises(ManifestBlobUnknown):
        await router_setup.router.put_manifest(repo, image_of(blob), by=BY)
    assert router_setup.hub.requested_repos == []
    for name in (repo, "library/app", "docker.io/someone/app"):
        with pytest.raises(UpstreamUnavailable):
            await router_setup.router.open_blob(RepositoryName(name), blob.digest)


@pytest.mark.parametrize("down", [False, True])
async def test_a_manifest_with_an_unknown_blob(router_setup: RouterSetup, down: bool) -> None:
    """A manifest with a blob that neither the store nor the upstream has is refused, whether or not the upstream
    answers."""
    router_setup.hub.down = down
    # This blob was pulled before.
    router_setup.hosted.add_blob(RepositoryName("docker.io/someone/app"), descriptor_of(b"x").digest, b"x")
    blob = await push_blob(MemoryRegistry(), NOWHERE, b"nowhere")
    with pytest.raises(ManifestBlobUnknown):
        await router_setup.router.put_manifest(RepositoryName("someone/app"), image_of(blob), by=BY)


async def test_only_a_mirrored_repository_has_a_mirror(router_setup: RouterSetup) -> None:
    """`require_mirrored` returns the mirror of a mirrored repository. For a hosted one, it raises an error."""
    mirrored = await router_setup.router.require_mirrored(RepositoryName("ubuntu"))
    assert (mirrored.registry, mirrored.repo, mirrored.upstream) == (
        router_setup.hub,
        "docker.io/library/ubuntu",
        "docker.io",
    )
    with pytest.raises(NameUnknown) as caught:
        await router_setup.router.require_mirrored(RepositoryName("team/app"), consequence=", so nothing happens")
    assert str(caught.value) == "team/app is hosted here and has no upstream, so nothing happens"


def test_a_default_that_is_not_mirrored() -> None:
    """If the default upstream is not one of the mirrored upstreams, `NamingRules` raises an error."""
    with pytest.raises(ValueError, match=r"docker\.io is not mirrored"):
        NamingRules((), default="docker.io")
