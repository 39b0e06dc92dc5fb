"""An import over the network adds a blob to a repository only if the old registry confirms that this repository has the
blob. The import asks the old registry even if this registry has already stored the blob or downloaded all its bytes."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from contextlib import closing
from urllib.parse import urlsplit

import pytest

from storage.errors import BlobUnknown
from storage.names import Digest, RepositoryName
from storage.store.stored_registry import StoredRegistry
from tests.fakes.hub.hub import Hub
from tests.fakes.import_run import ImportRun, assert_complete
from tests.fakes.upstream_content import ImageTree, UpstreamBlob, UpstreamContent, manifest_of, noise_image
from tests.fakes.upstream_source import scripted_server

LOGIN_PAGE = b"<html>login</html>"


def login_page_replies(manifest: bytes, media_type: str, config: UpstreamBlob) -> Callable[[str], bytes]:
    """Returns the replies of an old registry that has the image `evil/app:1` with this manifest and config. It answers
    requests for all other blobs with a login page."""

    def reply(head: str) -> bytes:
        kind, body = "application/json", b'{"name": "evil/app", "tags": ["1"]}'
        if "/manifests/" in head:
            kind, body = media_type, manifest
        elif config.digest in head:
            body = config.read()
        elif "/blobs/" in head:
            kind, body = "text/html", LOGIN_PAGE
        headers = f"Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        return f"HTTP/1.1 200 OK\r\n{headers}".encode() + (b"" if head.startswith("HEAD") else body)

    return reply


@pytest.mark.parametrize("names", [["bob/secret", "evil/app"], ["evil/app"]], ids=["together", "afterwards"])
@pytest.mark.slow
async def test_known_digest_gives_no_blob_of_another_repository(
    store: StoredRegistry, old_registry: Hub, run_import: ImportRun, content: UpstreamContent, names: list[str]
) -> None:
    """Two images in `evil/app` name layers that the old registry has only in `bob/secret`. One image names its layer as
    a foreign layer, which clients download from another server. This registry has stored both layers for `bob/secret`,
    but the import adds neither to `evil/app`. So it imports the image with the foreign layer without this layer, and
    cannot import the other image."""
    secret = content.add("bob/secret", noise_image("secret", 1000, 2000), "1")
    foreign_type = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
    configs = [UpstreamBlob(body, "application/vnd.oci.image.config.v1+json") for body in (b"{}", b"{ }")]
    foreign_layer = UpstreamBlob(secret.layers[1].body, foreign_type)
    plain = content.add("evil/app", manifest_of(configs[0], secret.layers[0]), "plain")
    content.add("evil/app", manifest_of(configs[1], foreign_layer), "foreign")
    old_registry.put(content)
    for layer in secret.layers:
        old_registry.remove("evil/app", layer.digest)
    await run_import(repositories=["bob/secret"])
    old_registry.forget()  # so that `count` below counts only the requests of the next import

    await run_import(repositories=names)

    reason = f"{old_registry.address} does not have the blob {plain.layers[0].digest}"
    assert run_import.reports() == [("evil/app:plain", reason)]
    assert (await store.tags(RepositoryName("evil/app"), None, 10)).items == ["foreign"]
    for layer in secret.layers:
        with pytest.raises(BlobUnknown):
            await store.resolve_blob(RepositoryName("evil/app"), Digest(layer.digest))
    await assert_complete(store, "bob/secret", secret)
    assert old_registry.count("blob", digest=secret.config.digest) == 0  # an unchanged image costs no blob request


async def test_head_response_with_another_size_gives_no_blob(
    store: StoredRegistry, old_registry: Hub, run_import: ImportRun, content: UpstreamContent
) -> None:
    """This registry has stored a blob for `bob/secret`. A manifest in `evil/app` names the digest of this blob, but the
    size of a login page. The old registry answers each request for the blob with this login page. The size in its
    response is not the size of the stored blob, so the import does not add the blob to `evil/app`."""
    secret = content.add("bob/secret", noise_image("secret", 1000), "1")
    layer = secret.layers[0]
    config = UpstreamBlob(b"{}", "application/vnd.oci.image.config.v1+json")
    page = UpstreamBlob(LOGIN_PAGE, layer.media_type)
    tree = manifest_of(config, page)
    body = tree.body.replace(page.digest.encode(), layer.digest.encode())
    content.add("evil/app", ImageTree(body, tree.media_type, {config.digest: config}), "1")
    old_registry.put(content)
    await run_import(repositories=["bob/secret"])

    async with scripted_server(login_page_replies(body, tree.media_type, config)) as script:
        await run_import(url=script.url, repositories=["evil/app"])
    [(name, _)] = run_import.reports()
    assert name == "evil/app:1"
    with pytest.raises(BlobUnknown):
        await store.resolve_blob(RepositoryName("evil/app"), Digest(layer.digest))


async def test_complete_download_of_another_repository_gives_no_blob(
    store: StoredRegistry, old_registry: Hub, run_import: ImportRun, content: UpstreamContent
) -> None:
    """An import was killed after all bytes of a blob had arrived, and before it stored the blob. The next import does
    not store the blob in a repository in which the old registry does not have it."""
    image = content.add("evil/app", noise_image("image", 1000), "1")
    layer = image.layers[0]
    old_registry.put(content)
    old_registry.remove("evil/app", layer.digest)
    # the name under which an import from this address claims partial downloads
    name = "-".join(["import", *re.findall("[a-z0-9]+", old_registry.address)])
    with closing(await store.partials.claim(Digest(layer.digest), layer.size, name)) as partial:
        await asyncio.to_thread(partial.write_at, 0, layer.read())

    await run_import(repositories=["evil/app"])

    reason = f"{old_registry.address} does not have the blob {layer.digest}"
    assert run_import.reports() == [("evil/app:1", reason)]


async def test_complete_download_is_not_confirmed_by_another_size(store: StoredRegistry, run_import: ImportRun) -> None:
    """An earlier import downloaded all bytes of a blob, but did not store the blob. Before the next import stores it in
    a repository, it asks the old registry for the size of the blob in this repository. The old registry answers with a
    login page, which has another size. So the import does not store the blob."""
    image = noise_image("image", 1000)
    layer = image.layers[0]
    async with scripted_server(login_page_replies(image.body, image.media_type, image.config)) as script:
        # the name under which an import from this address claims partial downloads
        name = "-".join(["import", *re.findall("[a-z0-9]+", urlsplit(script.url).netloc)])
        with closing(await store.partials.claim(Digest(layer.digest), layer.size, name)) as partial:
            await asyncio.to_thread(partial.write_at, 0, layer.read())
        await run_import(url=script.url, repositories=["evil/app"])
    with pytest.raises(BlobUnknown):
        await store.resolve_blob(RepositoryName("evil/app"), Digest(layer.digest))
    [(image_name, reason)] = run_import.reports()
    assert image_name == "evil/app:1"
    assert f"{layer.digest} does not have the size" in reason
