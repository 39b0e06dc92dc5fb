"""The API that lists the tags of a repository as rows."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from registry.auth.rights.principal import Identity, Principal, Rights
from registry.browse import image_overview, tag_rows
from registry.browse.content_reader import MAX_ROW_BYTES
from registry.browse.repository_browser import RepositoryBrowser
from registry.browse.stored_content import stored_content_router
from registry.naming import NamingRules
from registry.request import RequestContext
from storage.content import Actor, Descriptor, Manifest
from storage.errors import TooManyRequests
from storage.names import Digest, RepositoryName, Tag
from storage.store.stored_registry import StoredRegistry
from storage.tag_listing import TagQuery
from tests.fakes.registry_content import BY, descriptor_of, image_of, index_of, push_blob
from tests.unit.registry.browse.conftest import APP, CONFIG_TYPE, CREATED, Site

ATTESTATION = {"vnd.docker.reference.type": "attestation-manifest"}


async def get_rows(site: Site, query: str = "", repo: str = APP) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = (await site.json(f"{repo}/tag-list{query}"))["items"]
    return items


def platform(architecture: str) -> dict[str, object]:
    return {"os": "linux", "architecture": architecture}


async def test_the_row_of_an_image(site: Site) -> None:
    """The row of an image has the platform and the time from its config, and the size that the manifest states."""
    image = await site.image("v1")
    [row] = await get_rows(site)
    size = sum(blob.size for blob in image.blobs)
    assert row["platforms"] == [
        {
            "name": "linux/amd64",
            "digest": image.digest,
            "media_type": image.media_type,
            "present": True,
            "size": size,
        }
    ]
    assert (row["tag"], row["digest"], row["kind"], row["created"]) == ("v1", image.digest, "image", CREATED)
    assert (row["stored_bytes"], row["pushed_by"], row["last_pulled"], row["pulls"]) == (size, BY.name, None, 0)
    assert row["marks"] == {"signed": False, "sbom": False, "attested": False}
    assert (row["immutable"], row["frozen_at"]) == (False, None)


async def test_the_row_of_an_index(site: Site) -> None:
    """The row of an index has the size of each platform. BuildKit's attestations are shown as a mark, and not as a
    platform."""
    small, large = [await site.image(layers=[b"x" * size]) for size in (10, 1000)]
    layer = await push_blob(site.registry, APP, b"sbom")
    annotated = replace(layer, annotations={"in-toto.io/predicate-type": "https://spdx.dev/Document"})
    config = small.config
    assert config is not None
    attestation = image_of(config, [annotated])
    await site.registry.put_manifest(APP, attestation, by=BY)
    index = index_of(
        [
            replace(small.descriptor, platform=platform("amd64")),
            replace(large.descriptor, platform={**platform("arm"), "variant": "v7"}),
            replace(attestation.descriptor, platform=platform("unknown"), annotations=ATTESTATION),
        ]
    )
    await site.registry.put_manifest(APP, index, [Tag("v1")], by=BY)
    [row] = await get_rows(site)
    assert (row["kind"], row["created"], row["more_platforms"]) == ("index", CREATED, 0)
    assert [(entry["name"], entry["size"]) for entry in row["platforms"]] == [
        ("linux/amd64", sum(blob.size for blob in small.blobs)),
        ("linux/arm/v7", sum(blob.size for blob in large.blobs)),
    ]
    assert row["marks"] == {"signed": False, "sbom": True, "attested": True}


@pytest.mark.parametrize(
    ("artifact_type", "mark"),
    [
        ("application/vnd.dev.cosign.artifact.sig.v1+json", "signed"),
        ("application/vnd.dev.sigstore.bundle.v0.3+json", "signed"),
        ("application/vnd.cncf.notary.signature", "signed"),
        ("application/spdx+json", "sbom"),
        ("application/vnd.in-toto+json", "attested"),
        ("application/x.other", None),
    ],
)
async def test_marks_by_referrers(site: Site, artifact_type: str, mark: str | None) -> None:
    """A row has a mark if its image has a referrer of this kind: a signature, an SBOM or an attestation."""
    image = await site.image("v1")
    await site.image(config=b"{}", subject=image.digest, artifactType=artifact_type)
    [row] = await get_rows(site)
    assert [name for name, is_set in row["marks"].items() if is_set] == ([mark] if mark else [])


@pytest.mark.parametrize(
    ("predicate", "mark"),
    [
        ("https://sigstore.dev/cosign/sign/v1", "signed"),
        ("https://spdx.dev/Document", "sbom"),
        ("https://slsa.dev/provenance/v1", "attested"),
        ("https://slsa.dev/" + "x" * 10_000, "attested"),
    ],
    ids=["signature", "SBOM", "provenance", "long"],
)
async def test_marks_by_sigstore_bundles(site: Site, predicate: str, mark: str) -> None:
    """The annotation of a Sigstore bundle decides which mark the row of its image gets. If the annotations are too long
    to be read, the image is not marked as signed."""
    image = await site.image("v1")
    kind = "application/vnd.dev.sigstore.bundle.v0.3+json"
    annotations = {"dev.sigstore.bundle.predicateType": predicate}
    await site.image(config=b"{}", subject=image.digest, artifactType=kind, annotations=annotations)
    [row] = await get_rows(site)
    assert [name for name, is_set in row["marks"].items() if is_set] == [mark]


async def test_marks_by_cosigns_old_tags(site: Site) -> None:
    """Tags that older versions of cosign push become marks of the image that they name. They are rows of their own only
    if the request includes `referrer_tags`."""
    image = await site.image("v1")
    names = [f"{image.digest.replace(':', '-')}.{kind}" for kind in ("att", "sbom", "sig")]
    await site.image(*names, layers=[b"signature"])
    [row] = await get_rows(site)
    assert row["marks"] == {"signed": True, "sbom": True, "attested": True}
    assert [row["tag"] for row in await get_rows(site, "?referrer_tags=true")] == [*names, "v1"]


async def test_artifacts_and_broken_configs(site: Site) -> None:
    """A manifest that is not an image has a kind and no platforms. A config that is not JSON, or that has labels of a
    megabyte, causes no error."""
    chart = image_of(descriptor_of(b"{}", "application/vnd.cncf.helm.config.v1+json"), [])
    await push_blob(site.registry, APP, b"{}")
    await site.registry.put_manifest(APP, chart, [Tag("chart")], by=BY)
    await site.image("broken", config=b"no JSON")
    await site.image("labels", config={"os": "linux", "config": {"Labels": {"big": "x" * (1 << 20)}}})
    rows_by_tag = {row["tag"]: row for row in await get_rows(site)}
    assert (rows_by_tag["chart"]["kind"], rows_by_tag["chart"]["platforms"]) == ("artifact", [])
    assert rows_by_tag["chart"]["artifact_type"] == "application/vnd.cncf.helm.config.v1+json"
    for tag in ("broken", "labels"):
        [entry] = rows_by_tag[tag]["platforms"]
        assert (rows_by_tag[tag]["kind"], entry["name"], entry["present"]) == ("image", "", True)


async def test_a_config_larger_than_its_stated_size(site: Site) -> None:
    """The list of tags does not read a config that is larger than its manifest states. The details of the image still
    show it."""
    config = {"os": "linux", "architecture": "amd64", "author": "x" * MAX_ROW_BYTES}
    image = await site.image(config=config)
    assert image.config is not None
    small = image.body.replace(f'"size": {image.config.size}'.encode(), b'"size": 7')
    await site.registry.put_manifest(APP, Manifest.parse(small, image.media_type), [Tag("v1")], by=BY)
    [row] = await get_rows(site)
    assert [entry["name"] for entry in row["platforms"]] == [""]
    assert (await site.json(f"{APP}/manifests/v1/details"))["image"]["platform"] == "linux/amd64"


async def test_lists_are_paged_sorted_and_filtered(site: Site) -> None:
    """A list is sorted and filtered by its query. `next` leads through its pages. Invalid positions and queries are
    refused."""
    await site.image("v1.10", "v1.9", "v1.2", "other")
    tags, after = [], ""
    while True:
        page = await site.json(f"{APP}/tag-list?order=version&descending=true&text=V1&limit=2{after}")
        tags += [row["tag"] for row in page["items"]]
        if page["next"] is None:
            break
        after = f"&after={page['next'].replace(' ', '+')}"
    assert (tags, page["order"]) == (["v1.10", "v1.9", "v1.2"], "version")
    for query in ("after=x", "order=x", "limit=0", "limit=201", f"text={'x' * 129}"):
        assert (await site.get(f"{APP}/tag-list?{query}")).status in (400, 422), query


async def test_repositories_that_may_not_be_pulled_look_missing(site: Site) -> None:
    """For an account without the right to pull, an existing repository looks like one that does not exist, on every
    route. An anonymous client gets 401."""
    await site.image("v1")
    routes = ["tag-list", "manifests/v1/details", "manifests/v1/raw", "manifests/v1/config"]
    for route in routes:
        assert (await site.get(f"{APP}/{route}")).status == 200
        answers = [await site.get(f"{name}/{route}", "other") for name in (APP, "team/none")]
        assert [answer.status for answer in answers] == [404, 404]
        assert answers[0].body.replace(APP.encode(), b"team/none") == answers[1].body
        assert (await site.get(f"{APP}/{route}", None)).status == 401
        assert (await site.get(f"team/none/{route}")).status == 404


async def test_a_name_may_contain_the_words_of_a_path(site: Site) -> None:
    """A repository's name may contain the words that the paths of the API have."""
    for name in ("team/a/tag-list", "team/manifests/v1/details", "team/manifests/v1/raw"):
        image = await site.image("v1", repo=RepositoryName(name))
        assert [row["digest"] for row in await get_rows(site, repo=name)] == [image.digest]
        assert (await site.json(f"{name}/manifests/v1/details"))["digest"] == image.digest
        assert (await site.get(f"{name}/manifests/v1/raw")).body == image.body


UBUNTU = RepositoryName("docker.io/library/ubuntu")
PRIVATE = RepositoryName("private.example/app")
NAMING = NamingRules(["docker.io", "private.example"], default="docker.io")


@pytest.fixture
def browser(site: Site) -> RepositoryBrowser:
    """Returns a `RepositoryBrowser` over the site's store, with two upstreams in its settings, one of them private."""
    assert site.app.app.service.access is not None
    store: StoredRegistry = site.app.app.service.access.management.upkeep.store
    stored = stored_content_router(
        store,
        NAMING,
        store.is_known_repository,
        private=["private.example"],
        is_confirmed=store.records.is_confirmed,
    )
    return RepositoryBrowser(stored, stored, store)


def admin_context() -> RequestContext:
    return RequestContext(Principal(Identity("root"), Rights.everything(admin=True)))


async def mirror_index(site: Site, repo: RepositoryName, count: int) -> Digest:
    """Stores an index with `count` platforms, as a mirror would that has cached only one of its manifests, and no
    layer."""
    store: Any = site.app.app.service.access.management.upkeep.store  # type: ignore[union-attr]
    config = await push_blob(store, repo, b'{"os": "linux", "architecture": "cpu"}')
    images = [
        image_of(Descriptor(CONFIG_TYPE, config.digest, config.size), [descriptor_of(f"layer {number}".encode())])
        for number in range(count)
    ]
    index = index_of([replace(each.descriptor, platform=platform(f"cpu{n}")) for n, each in enumerate(images)])
    for manifest in (images[count // 2], index):
        await store.put_manifest(repo, manifest, [Tag("v1")], by=Actor("mirror"), sparse=True)
    await store.upstream_tags.freeze(repo, Tag("v1"), index.digest, by=BY)
    return index.digest


async def test_a_page_lists_a_limited_number_of_platforms(
    site: Site, browser: RepositoryBrowser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows of a page together list a limited number of platforms, and count the others, even if many tags point at
    the same index."""
    monkeypatch.setattr(image_overview, "MAX_PAGE_PLATFORMS", 8)
    monkeypatch.setattr(tag_rows, "MAX_PAGE_PLATFORMS", 8)
    await mirror_index(site, UBUNTU, 5)
    store: Any = site.app.app.service.access.management.upkeep.store  # type: ignore[union-attr]
    index = await store.get_manifest(UBUNTU, Tag("v1"))
    await store.put_manifest(UBUNTU, index, [Tag("v2"), Tag("v3")], by=Actor("mirror"), sparse=True)
    page = await browser.tag_page(admin_context(), UBUNTU, TagQuery(), None, 10)
    assert [(len(row.platforms), row.more_platforms) for row in page.items] == [(5, 0), (3, 2), (0, 5)]


async def test_large_manifests_in_an_index(site: Site) -> None:
    """The list of tags does not read large manifests in an index, whatever size the index states. The details of such
    an image are still shown."""
    note = {"note": "x" * MAX_ROW_BYTES}
    large = await site.image(annotations=note)
    entries = [replace(large.descriptor, annotations=None, size=7, platform=platform("amd64"))]
    await site.registry.put_manifest(APP, index_of(entries, annotations=note), [Tag("large-index")], by=BY)
    await site.registry.put_manifest(APP, index_of(entries), [Tag("small-index")], by=BY)
    rows_by_tag = {row["tag"]: row for row in await get_rows(site)}
    assert rows_by_tag["large-index"]["kind"] == "unreadable"
    [entry] = rows_by_tag["small-index"]["platforms"]
    assert (entry["name"], entry["present"], entry["size"]) == ("linux/amd64", True, None)
    for tag in rows_by_tag:
        view = await site.json(f"{APP}/manifests/{tag}/details")
        assert (view["kind"], view["platforms"][0]["name"]) == ("index", "linux/amd64")
        assert view["image"]["digest"] == large.digest


async def test_reads_of_one_account_are_limited(site: Site, browser: RepositoryBrowser) -> None:
    """Only two reads of one account run at a time. The others wait, and are refused if too many wait. Other accounts
    are answered meanwhile."""
    await mirror_index(site, UBUNTU, 1)
    alice, bob = (RequestContext(Principal(Identity(name), Rights.everything())) for name in ("alice", "bob"))
    await browser.tag_page(bob, UBUNTU, TagQuery(), None, 10)  # from here on, the summaries are in memory
    gate, are_reading, reads = asyncio.Event(), asyncio.Event(), 0
    stored: Any = browser._registry
    get_manifest = stored.get_manifest

    async def slow_get(repo: RepositoryName, reference: Any) -> Any:
        nonlocal reads
        reads += 1
        if reads == 2:
            are_reading.set()
        await gate.wait()
        return await get_manifest(repo, reference)

    stored.get_manifest = slow_get
    async with asyncio.TaskGroup() as tasks:
        waiting = [tasks.create_task(browser.raw_manifest(alice, UBUNTU, Tag("v1"))) for _ in range(20)]
        await are_reading.wait()
        await asyncio.sleep(0)  # now all reads wait
        with pytest.raises(TooManyRequests):
            await browser.raw_manifest(alice, UBUNTU, Tag("v1"))
        assert (await browser.tag_page(bob, UBUNTU, TagQuery(), None, 10)).items
        assert reads == 2
        gate.set()
    assert {(await task).digest for task in waiting} == {(await get_manifest(UBUNTU, Tag("v1"))).digest}


async def test_platforms_that_are_not_stored(site: Site, browser: RepositoryBrowser) -> None:
    """For an index with 150 platforms, of which the mirror has stored only one, the first hundred are listed. No
    request is sent to the upstream, so the missing platforms cause no error."""
    digest = await mirror_index(site, UBUNTU, 150)
    page = await browser.tag_page(admin_context(), UBUNTU, TagQuery(), None, 10)
    [row] = page.items
    assert (len(row.platforms), row.more_platforms) == (100, 50)
    assert [entry.name for entry in row.platforms if entry.present] == ["linux/cpu75"]
    assert [entry.name for entry in row.platforms if entry.size is not None] == ["linux/cpu75"]
    assert row.frozen_at == digest
    view = await browser.manifest(admin_context(), UBUNTU, Tag("v1"))
    assert view.image is not None
    assert [step.layer.present for step in view.image.steps if step.layer] == [False]
    assert (await browser.manifest(admin_context(), UBUNTU, Tag("v1"), "linux/cpu3")).image is None


async def test_configs_of_a_private_upstream(site: Site, browser: RepositoryBrowser) -> None:
    """A config in a mirrored repository of a private upstream is shown only if the upstream has confirmed that the
    repository has this blob."""
    store: Any = site.app.app.service.access.management.upkeep.store  # type: ignore[union-attr]
    await mirror_index(site, PRIVATE, 1)
    view = await browser.manifest(admin_context(), PRIVATE, Tag("v1"))
    assert view.image is not None
    assert view.image.config is not None  # this config was stored for this repository
    secret = await push_blob(store, UBUNTU, b'{"author": "secret"}')
    await store.mount_blob(PRIVATE, secret.digest, UBUNTU, BY)
    image = image_of(Descriptor(CONFIG_TYPE, secret.digest, secret.size))
    await store.put_manifest(PRIVATE, image, [Tag("v2")], by=Actor("mirror"), sparse=True)
    view = await browser.manifest(admin_context(), PRIVATE, Tag("v2"))
    assert view.image is not None
    assert view.image.config is None
