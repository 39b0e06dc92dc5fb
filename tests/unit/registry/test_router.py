"""Which registry answers each call on a name: where reads and pushes go, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing

import pytest

from registry.naming import NamingRules
from registry.request import UNRESTRICTED, RequestContext, enter_request
from registry.router import Router
from storage.content import OCI_MANIFEST, Descriptor, Manifest, Page, Span
from storage.errors import BlobUnknown, Denied, ManifestBlobUnknown, ManifestUnknown, NameUnknown, UpstreamUnavailable
from storage.interface import Registry
from storage.memory_registry import MemoryBlobReader, MemoryRegistry
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
PATTERNS = ("team/**", "own-*", "one/app")


class RecordingMirror(MemoryRegistry):
    """A mirror with the content of its upstream, by stored names. `asked`: the repositories of all calls."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.down = False

    async def resolve_blob(self, repo: RepositoryName, digest: Digest) -> Descriptor:
        self._ask(repo)
        return await super().resolve_blob(repo, digest)

    async def get_manifest(self, repo: RepositoryName, reference: Reference) -> Manifest:
        self._ask(repo)
        return await super().get_manifest(repo, reference)

    async def tags(self, repo: RepositoryName, after: str | None, limit: int) -> Page[Tag]:
        self._ask(repo)
        return await super().tags(repo, after, limit)

    def _ask(self, repo: RepositoryName) -> None:
        self.asked.append(repo)
        if self.down:
            raise UpstreamUnavailable


class FillingMirror(RecordingMirror):
    """A mirror that stores each blob that is read through it in `local`, the store that it shares with the hosted
    registry."""

    def __init__(self, local: MemoryRegistry) -> None:
        super().__init__()
        self._local = local

    async def open_blob(self, repo: RepositoryName, digest: Digest, span: Span | None = None) -> MemoryBlobReader:
        self._ask(repo)
        async with aclosing(await super().open_blob(repo, digest)) as reader:
            self._local.add_blob(repo, digest, b"".join([data async for data in reader]))
        return await self._local.open_blob(repo, digest, span)


class RouterSetup:
    """A router, and the registries behind it."""

    def __init__(self, default: str | None = "docker.io", prefixes: Sequence[str] = PATTERNS) -> None:
        self.hosted = MemoryRegistry()
        self.hub, self.ghcr = FillingMirror(self.hosted), RecordingMirror()
        self.known_asked = 0
        mirrors = {"docker.io": self.hub, "ghcr.io": self.ghcr}
        self.router = Router(
            self.hosted, mirrors, self._known, NamingRules(mirrors, default=default, always_hosted=prefixes)
        )

    async def _known(self, repo: RepositoryName) -> bool:
        self.known_asked += 1
        try:
            await self.hosted.tags(repo, None, 1)
        except NameUnknown:
            return False
        return True

    def name_of(self, registry: Registry) -> str:
        return {id(self.hosted): "hosted", id(self.hub): "hub", id(self.ghcr): "ghcr"}[id(registry)]

    async def leads(self, name: str) -> tuple[str, str]:
        """Returns the registry that answers reads of a name, and the stored name."""
        place = await self.router.locate(RepositoryName(name))
        return self.name_of(place.registry), place.repo


@pytest.fixture(autouse=True)
async def request_without_accounts() -> None:
    """The current request is one to a registry without accounts."""
    enter_request(RequestContext(UNRESTRICTED))


@pytest.fixture
def houses() -> RouterSetup:
    return RouterSetup()


WITH_HUB = [
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


@pytest.mark.parametrize(("name", "where", "stored"), WITH_HUB)
async def test_where_reads_go(houses: RouterSetup, name: str, where: str, stored: str) -> None:
    """With docker.io as the default upstream and ghcr.io as another one, each form of a name has one registry and one
    stored name. A name with the host of a registry that is not mirrored is hosted."""
    assert await houses.leads(name) == (where, stored)


@pytest.mark.parametrize("name", ["ubuntu", "library/ubuntu", "someone/app", "quay.io/org/app", "team/app"])
async def test_without_a_default_names_without_a_host_are_hosted(name: str) -> None:
    """Without a default upstream, names without a host are hosted."""
    houses = RouterSetup(default=None)
    assert await houses.leads(name) == ("hosted", name)
    assert await houses.leads("docker.io/ubuntu") == ("hub", "docker.io/library/ubuntu")
    await push_image(houses.router, RepositoryName(name), "x", "latest")


async def test_another_default_adds_no_library() -> None:
    """`library/` is added for Docker Hub only. With another default upstream, a name of one part is not changed."""
    houses = RouterSetup(default="ghcr.io")
    assert await houses.leads("app") == ("ghcr", "ghcr.io/app")
    assert await houses.leads("library/app") == ("ghcr", "ghcr.io/library/app")
    assert await houses.leads("docker.io/app") == ("hub", "docker.io/library/app")


@pytest.mark.parametrize("name", ["a" * 255, "a/" + "b" * 253])
async def test_a_name_too_long_to_be_mirrored_is_hosted(houses: RouterSetup, name: str) -> None:
    """A name that would be too long with the upstream's name in front is hosted, and can be pushed and pulled."""
    assert await houses.leads(name) == ("hosted", name)
    await push_image(houses.router, RepositoryName(name), "x", "latest")


@pytest.mark.parametrize("name", ["docker.io", "ghcr.io"])
async def test_an_upstream_is_no_repository(houses: RouterSetup, name: str) -> None:
    """A repository name that is only an upstream's name is unknown, and pushes to it are refused."""
    with pytest.raises(NameUnknown, match=f"pull {name}/NAME"):
        await houses.router.get_manifest(RepositoryName(name), LATEST)
    with pytest.raises(Denied):
        await houses.router.start_upload(RepositoryName(name))


MIRRORED = ["library/ubuntu", "docker.io/ubuntu", "docker.io/team/app", "ghcr.io/org/app", "library/a/b"]


@pytest.mark.parametrize("name", MIRRORED)
async def test_pushes_to_mirrored_names_are_denied(houses: RouterSetup, name: str) -> None:
    """Every call that writes to a mirrored name is denied. The error names the upstream and says what to do. No call
    reaches a registry."""
    repo, router = RepositoryName(name), houses.router
    upload = (await houses.hosted.start_upload(repo)).id
    blob = await push_blob(houses.hosted, NOWHERE, b"x")
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
        await houses.hosted.tags(repo, None, 1)


@pytest.mark.parametrize("name", ["myapp", "someone/app", "team/app", "quay.io/org/app"])
async def test_pushing_makes_a_name_ours_for_good(houses: RouterSetup, name: str) -> None:
    """From the first pushed blob on, the upstream is never asked for the name again: not by tag, not by digest, not for
    lists, and not after everything was deleted, even if the upstream has a repository of this name."""
    repo, router = RepositoryName(name), houses.router
    theirs = await push_image(houses.hub, RepositoryName(f"docker.io/{name}"), "theirs", "latest", "only-there")
    ours = await push_image(router, repo, "ours", "latest")
    assert await houses.leads(name) == ("hosted", name)
    houses.hub.asked.clear()
    assert (await router.get_manifest(repo, LATEST)).digest == ours.digest
    for reference in (Tag("only-there"), theirs.digest):
        with pytest.raises(ManifestUnknown):
            await router.get_manifest(repo, reference)
    with pytest.raises(BlobUnknown):
        await router.resolve_blob(repo, theirs.blobs[0].digest)
    assert list((await router.tags(repo, None, 10)).items) == ["latest"]
    await router.delete_manifest(repo, ours.digest, by=BY)
    with pytest.raises(ManifestUnknown):
        await router.get_manifest(repo, LATEST)
    assert list((await router.tags(repo, None, 10)).items) == []
    assert houses.hub.asked == []


async def test_a_hosted_single_name_leaves_the_library_alone(houses: RouterSetup) -> None:
    """After a push to `myapp`, this name is hosted, and `library/myapp` and `docker.io/myapp` still mean Docker Hub's
    repository."""
    await push_image(houses.router, RepositoryName("myapp"), "ours", "latest")
    theirs = await push_image(houses.hub, RepositoryName("docker.io/library/myapp"), "theirs", "latest")
    for name in ("library/myapp", "docker.io/myapp"):
        assert (await houses.router.get_manifest(RepositoryName(name), LATEST)).digest == theirs.digest


async def test_a_push_elsewhere_counts_at_once(houses: RouterSetup) -> None:
    """That nothing was pushed to a name is never cached: a push by another process counts for the next call. That
    something was pushed is cached."""
    repo = RepositoryName("someone/app")
    assert await houses.leads(repo) == ("hub", "docker.io/someone/app")
    await push_blob(houses.hosted, repo, b"from another worker")
    assert await houses.leads(repo) == ("hosted", repo)
    before = houses.known_asked
    assert await houses.leads(repo) == ("hosted", repo)
    assert houses.known_asked == before


async def test_a_name_of_a_pattern_is_never_looked_up(houses: RouterSetup) -> None:
    """For a name that matches a hosted pattern, neither the upstream nor the store is asked where it belongs."""
    with pytest.raises(ManifestUnknown):
        await houses.router.get_manifest(RepositoryName("team/app"), LATEST)
    assert (houses.hub.asked, houses.known_asked) == ([], 0)


async def test_an_upload_of_a_mirrored_name_can_become_hosted(houses: RouterSetup) -> None:
    """A name that was read from the default upstream can be pushed to. The mirrored content stays under its own
    name."""
    repo = RepositoryName("someone/app")
    theirs = await push_image(houses.hub, RepositoryName("docker.io/someone/app"), "theirs", "latest")
    assert (await houses.router.get_manifest(repo, LATEST)).digest == theirs.digest
    ours = await push_image(houses.router, repo, "ours", "latest")
    assert (await houses.router.get_manifest(repo, LATEST)).digest == ours.digest
    there = RepositoryName("docker.io/someone/app")
    assert (await houses.router.get_manifest(there, LATEST)).digest == theirs.digest


@pytest.mark.parametrize("name", ["ubuntu", "library/ubuntu", "docker.io/ubuntu", "docker.io/library/ubuntu"])
async def test_deletes_of_mirrored_names_go_to_the_mirror(houses: RouterSetup, name: str) -> None:
    """A delete of a mirrored name deletes the cached content, whatever form of the name is used."""
    stored, repo = RepositoryName("docker.io/library/ubuntu"), RepositoryName(name)
    image = await push_image(houses.hub, stored, "x", "latest", "other")
    await houses.router.delete_tag(repo, Tag("other"), by=BY)
    await houses.router.delete_manifest(repo, image.digest, by=BY)
    await houses.router.delete_blob(repo, image.blobs[0].digest, by=BY)
    with pytest.raises(ManifestUnknown):
        await houses.hub.get_manifest(stored, LATEST)


async def test_lists_follow_the_name(houses: RouterSetup) -> None:
    """Tags and referrers are listed by the registry that the name belongs to. The list of repositories is that of the
    store, with stored names."""
    stored = RepositoryName("docker.io/library/ubuntu")
    image = await push_image(houses.hub, stored, "x", "22.04")
    await push_image(houses.hub, stored, "signature", subject=image.digest)
    assert list((await houses.router.tags(RepositoryName("ubuntu"), None, 10)).items) == ["22.04"]
    page = await houses.router.referrers(RepositoryName("ubuntu"), image.digest, None, None, 10)
    assert len(page.items) == 1
    await push_image(houses.hosted, stored, "kept by the mirror", "22.04")
    await push_image(houses.router, RepositoryName("team/app"), "y", "1")
    assert list((await houses.router.repositories(None, 10)).items) == [stored, "team/app"]


@pytest.mark.parametrize("source", ["ubuntu", "library/ubuntu", "docker.io/ubuntu", None])
async def test_mounts_from_a_mirrored_name(houses: RouterSetup, source: str | None) -> None:
    """The source of a mount may be any form of a mirrored name. A blob that the store has there is mounted into the
    hosted repository."""
    blob = await push_blob(houses.hosted, RepositoryName("docker.io/library/ubuntu"), b"a layer")
    repo = RepositoryName("team/app")
    await houses.router.mount_blob(repo, blob.digest, RepositoryName(source) if source else ALL_NAMES, BY)
    assert await read_blob(houses.router, repo, blob.digest) == b"a layer"


async def test_a_mount_fetches_nothing(houses: RouterSetup) -> None:
    """A blob that the mirror would have to fetch is not mounted, so the client uploads it."""
    blob = await push_blob(houses.hub, RepositoryName("docker.io/library/ubuntu"), b"a layer")
    with pytest.raises(BlobUnknown):
        await houses.router.mount_blob(RepositoryName("team/app"), blob.digest, RepositoryName("ubuntu"), BY)
    assert houses.hub.asked == []


async def test_a_push_of_blobs_that_the_mirror_said_were_there(houses: RouterSetup) -> None:
    """If the mirror has told a client that the blobs exist, the client does not upload them. Its manifest is accepted,
    and the blobs are copied into the hosted repository. Blobs that are stored already are not fetched."""
    there, repo = RepositoryName("docker.io/someone/app"), RepositoryName("someone/app")
    config, layer = await push_blob(houses.hub, there, b"{}"), await push_blob(houses.hub, there, b"layer")
    houses.hosted.add_blob(there, layer.digest, b"layer")  # it was pulled before
    for blob in (config, layer):
        assert (await houses.router.resolve_blob(repo, blob.digest)).size == blob.size
    houses.hub.asked.clear()
    await houses.router.put_manifest(repo, image_of(config, [layer]), [LATEST], by=BY)
    assert len(houses.hub.asked) == 1
    assert await read_blob(houses.router, repo, config.digest) == b"{}"
    assert await read_blob(houses.router, repo, layer.digest) == b"layer"
    assert await houses.leads(repo) == ("hosted", repo)


async def test_a_push_of_an_index_whose_children_the_mirror_has(houses: RouterSetup) -> None:
    """The manifests that a pushed index lists are copied as well, with their blobs."""
    there, repo = RepositoryName("docker.io/library/tool"), RepositoryName("tool")
    child = await push_image(houses.hub, there, "child", "latest")
    houses.hosted.add_blob(there, child.blobs[0].digest, await read_blob(houses.hub, there, child.blobs[0].digest))
    index = index_of([Descriptor(OCI_MANIFEST, child.digest, len(child.body))])
    await houses.router.put_manifest(repo, index, [LATEST], by=BY)
    assert (await houses.hosted.get_manifest(repo, child.digest)).body == child.body
    for blob in child.blobs:
        await read_blob(houses.hosted, repo, blob.digest)


async def test_a_name_that_is_ours_takes_only_what_is_here(houses: RouterSetup) -> None:
    """After the first push of a blob, the upstream is not asked for the others. Those that the store has are mounted,
    others are MANIFEST_BLOB_UNKNOWN."""
    there, repo = RepositoryName("docker.io/someone/app"), RepositoryName("someone/app")
    here, far = await push_blob(houses.hosted, there, b"here"), await push_blob(houses.hub, there, b"far")
    pushed = await push_blob(houses.router, repo, b"pushed")
    await houses.router.put_manifest(repo, image_of(pushed, [here]), by=BY)
    with pytest.raises(ManifestBlobUnknown):
        await houses.router.put_manifest(repo, image_of(pushed, [far]), by=BY)
    assert houses.hub.asked == []


@pytest.mark.parametrize("name", ["team/app", "quay.io/org/app"])
async def test_a_name_never_asked_upstream_takes_nothing_from_there(houses: RouterSetup, name: str) -> None:
    """If nothing was pulled under the name, a push needs all its blobs, even if the mirrored repository of the same
    name has them."""
    blob = await push_blob(houses.hosted, RepositoryName(f"docker.io/{name}"), b"theirs")
    with pytest.raises(ManifestBlobUnknown):
        await houses.router.put_manifest(RepositoryName(name), image_of(blob), by=BY)
    assert houses.hub.asked == []


async def test_a_push_of_a_new_name_asks_nobody(houses: RouterSetup) -> None:
    """While nothing was pulled under a name, the upstream is not asked which blobs exist. So a push succeeds while the
    upstream is down, and the upstream learns no private names. A pull asks the upstream."""
    houses.hub.down = True
    repo = RepositoryName("someone/app")
    blob = await push_blob(houses.hub, RepositoryName("docker.io/someone/app"), b"x")
    with pytest.raises(BlobUnknown):
        await houses.router.resolve_blob(repo, blob.digest)
    with pytest.raises(ManifestBlobUnknown):
        await houses.router.put_manifest(repo, image_of(blob), by=BY)
    assert houses.hub.asked == []
    for name in (repo, "library/app", "docker.io/someone/app"):
        with pytest.raises(UpstreamUnavailable):
            await houses.router.open_blob(RepositoryName(name), blob.digest)


@pytest.mark.parametrize("down", [False, True])
async def test_a_manifest_with_a_blob_that_nobody_has(houses: RouterSetup, down: bool) -> None:
    """A manifest with a blob that is nowhere is refused as without a mirror, whether or not the upstream answers."""
    houses.hub.down = down
    houses.hosted.add_blob(
        RepositoryName("docker.io/someone/app"), descriptor_of(b"x").digest, b"x"
    )  # it was pulled before
    blob = await push_blob(MemoryRegistry(), NOWHERE, b"nowhere")
    with pytest.raises(ManifestBlobUnknown):
        await houses.router.put_manifest(RepositoryName("someone/app"), image_of(blob), by=BY)


def test_a_default_that_is_not_mirrored() -> None:
    """A default upstream that is not mirrored is refused when the naming rules are made."""
    with pytest.raises(ValueError, match=r"docker\.io is not mirrored"):
        NamingRules((), default="docker.io")
