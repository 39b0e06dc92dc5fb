"""An import over the network while the old registry is restarting behind a proxy, while one repository or one referrer
is broken there, or while it refuses the login."""

from __future__ import annotations

import pytest

from registry.migration.request_retries import FAILURES_TO_END, MAX_REFUSED_REQUESTS
from storage.imports import ImportInvalid, OldRegistryDown
from storage.names import Digest
from storage.store.stored_registry import StoredRegistry
from tests.fakes.hub.hub import Hub
from tests.fakes.import_run import ImportRun, assert_complete
from tests.fakes.raw_http import chunked
from tests.fakes.upstream_content import ImageTree, UpstreamContent, noise_image
from tests.fakes.upstream_source import answer, scripted_server
from tests.unit.registry.migration.remote_import.conftest import APP, Pauses


def add_signed_image(content: UpstreamContent, tag: str) -> tuple[ImageTree, ImageTree]:
    """Adds an image with a signature. Returns both."""
    image = content.add(APP, noise_image(f"image {tag}", 10), tag)
    return image, content.add(APP, noise_image(f"signature {tag}", 10, subject=image))


async def imported_referrers(store: StoredRegistry, image: ImageTree) -> list[str]:
    return [each.digest for each in (await store.referrers(APP, Digest(image.digest), None, None, 10)).items]


@pytest.mark.parametrize("kind", ["tags", "manifest", "blob", "referrers"])
@pytest.mark.slow
async def test_the_page_of_a_proxy_is_not_final(
    store: StoredRegistry,
    old_registry: Hub,
    run_import: ImportRun,
    content: UpstreamContent,
    pauses: Pauses,
    kind: str,
) -> None:
    """A proxy responds with 404 and an HTML page while the old registry restarts. The import repeats the request, and
    imports the image and its signature."""
    image, signature = add_signed_image(content, "1")
    old_registry.put(content)
    # The first request for referrers shows that the old registry has the referrers API.
    old_registry.fault(on=kind, method="", skip=kind == "referrers", status=404, page=True, times=2)
    if kind == "referrers":
        # After a 404 for the referrers, the import requests the manifest again, to find out whether the old registry is
        # restarting. So these requests must fail, too.
        old_registry.fault(on="manifest", method="", skip=2, status=404, page=True, times=2)

    result = await run_import()

    assert (result["tags"], run_import.reports()) == (1, [])
    assert pauses
    await assert_complete(store, APP, image)
    assert await imported_referrers(store, image) == [signature.digest]


@pytest.mark.slow
async def test_referrers_that_a_proxy_hides_are_a_problem(
    store: StoredRegistry, old_registry: Hub, run_import: ImportRun, content: UpstreamContent
) -> None:
    """A proxy responds in place of the old registry to all attempts to list the referrers of an image. The image is
    imported, and the missing referrers are a problem. The next import adds them."""
    image, signature = add_signed_image(content, "1")
    old_registry.put(content)
    old_registry.fault(on="referrers", skip=1, status=404, page=True, times=None)
    # The image takes two requests.
    old_registry.fault(on="manifest", method="", skip=2, status=404, page=True, times=None)

    result = await run_import()

    [(name, reason)] = run_import.reports()
    assert (result["tags"], name) == (1, f"team/app:{image.digest}")
    assert reason.startswith(f"{old_registry.address} does not show its referrers, such as signatures: ")

    old_registry.clear()
    await run_import()
    assert run_import.reports() == []
    assert await imported_referrers(store, image) == [signature.digest]


@pytest.mark.parametrize("repositories", [[str(APP), "other"], ["other", str(APP)]])
@pytest.mark.slow
async def test_a_repository_without_the_referrers_api(
    store: StoredRegistry,
    old_registry: Hub,
    run_import: ImportRun,
    content: UpstreamContent,
    pauses: Pauses,
    repositories: list[str],
) -> None:
    """The old registry has the referrers API for one repository, but not for another one. Both are imported without
    pauses and problems, and with the referrers of the first one, whichever of the two is imported first."""
    image, signature = add_signed_image(content, "1")
    other_image = content.add("other", noise_image("other", 10), "1")
    old_registry.put(content)
    old_registry.fault(on="referrers", match="/other/", status=404, page=True, times=None)

    result = await run_import(repositories=repositories, jobs=1)

    assert (result["tags"], run_import.reports(), pauses) == (2, [], [])
    assert await imported_referrers(store, image) == [signature.digest]
    await assert_complete(store, "other", other_image)


async def test_a_proxy_does_not_show_that_there_is_no_referrers_api(
    store: StoredRegistry, old_registry: Hub, run_import: ImportRun, content: UpstreamContent
) -> None:
    """The old registry restarts just when the import asks whether it has the referrers API, and the proxy in front of
    it responds with 404 to all attempts. This is a problem of the first image only: the referrers of the second image
    are imported."""
    first, _ = add_signed_image(content, "1")
    second, signature = add_signed_image(content, "2")
    old_registry.put(content)
    attempts = 5
    old_registry.fault(on="referrers", status=404, page=True, times=attempts)
    # The first image takes two requests. Then each attempt sends a HEAD and a GET.
    old_registry.fault(on="manifest", method="", skip=2, status=404, page=True, times=2 * attempts)

    result = await run_import(jobs=1)

    assert (result["tags"], [name for name, _ in run_import.reports()]) == (2, ["team/app:1"])
    assert old_registry.faults == 0
    assert await imported_referrers(store, second) == [signature.digest]
    assert await imported_referrers(store, first) == []


async def test_a_firewall_that_refuses_the_referrers_api(
    store: StoredRegistry, old_registry: Hub, run_import: ImportRun, content: UpstreamContent, pauses: Pauses
) -> None:
    """A firewall refuses all requests for referrers, but no others. The images are imported without pauses, and each is
    reported, because its referrers may be missing."""
    for tag in ("1", "2", "3"):
        add_signed_image(content, tag)
    old_registry.put(content)
    old_registry.fault(on="referrers", status=403, page=True, times=None)

    result = await run_import()

    assert (result["tags"], result["problems"], pauses) == (3, 3, [])
    assert {name for name, _ in run_import.reports()} == {"team/app:1", "team/app:2", "team/app:3"}


@pytest.mark.parametrize("status", [400, 404, 405, 406, 501])
@pytest.mark.parametrize("skip", [0, 1])
@pytest.mark.slow
async def test_one_page_in_place_of_a_list_of_referrers(
    store: StoredRegistry,
    old_registry: Hub,
    run_import: ImportRun,
    content: UpstreamContent,
    pauses: Pauses,
    status: int,
    skip: int,
) -> None:
    """A proxy responds to one request for referrers, and the old registry to the next requests. The import does not
    conclude from the missing fallback tag that the image has no referrers. The first request asks whether there is a
    referrers API. If the page is the response to this request, the import needs no pause: it requests the manifest,
    sees that the old registry is not restarting, and repeats the request at once."""
    image, signature = add_signed_image(content, "1")
    old_registry.put(content)
    old_registry.fault(on="referrers", skip=skip, status=status, page=True)
    await run_import()
    assert (run_import.reports(), len(pauses)) == ([], skip)
    assert await imported_referrers(store, image) == [signature.digest]


async def test_a_proxy_that_responds_to_everything(run_import: ImportRun, pauses: Pauses) -> None:
    """If the proxy responds with 404 to all requests, the import ends after a few repositories, as if there were no
    responses."""
    async with scripted_server(lambda head: answer(404, "404 page not found\n")) as script:
        with pytest.raises(OldRegistryDown, match="run the import again later"):
            await run_import(url=script.url, repositories=[f"app{number}" for number in range(50)])
    assert len(run_import.reports()) == FAILURES_TO_END - 1
    assert len(pauses) == 4 * FAILURES_TO_END


@pytest.mark.parametrize("page_bytes", [400_000, 600_000], ids=["shorter", "longer"])
@pytest.mark.slow
async def test_the_page_of_a_proxy_is_no_part_of_a_blob(
    store: StoredRegistry, run_import: ImportRun, pauses: Pauses, page_bytes: int
) -> None:
    """The old registry and its proxy do not state the lengths of blobs. The first response to a request for a blob has
    the status 200 and a page of the proxy. The import deletes the bytes of the page, and repeats the request."""
    image = noise_image("image", 500_000)
    layer = image.layers[0]
    bodies = iter([bytes(page_bytes)])

    def reply(head: str) -> bytes:
        resource = head.split()[1].rpartition("/")[2]
        if "/manifests/" in head:
            return answer(200, image.body, content_type=image.media_type)
        if "/referrers/" in head:
            return answer(404)
        if "/tags/list" in head:
            return answer(200, f'{{"name": "{APP}", "tags": ["1"]}}')
        if "/blobs/" not in head:
            return answer(200)
        response_head = b"HTTP/1.1 200 Said\r\ntransfer-encoding: chunked\r\n\r\n"
        if head.startswith("HEAD"):
            return response_head
        body = image.blobs[resource].read()
        is_download = resource == layer.digest and "range: " in head.lower()
        return response_head + chunked(next(bodies, body) if is_download else body)

    async with scripted_server(reply) as script:
        result = await run_import(url=script.url)

    assert (result["tags"], run_import.reports()) == (1, [])
    assert pauses
    await assert_complete(store, APP, image)


@pytest.mark.parametrize(("pages", "status"), [(2, 404), (100, 404), (2, 502), (100, 502), (100, 429)])
async def test_a_proxy_responds_in_place_of_a_page_of_the_list(run_import: ImportRun, pages: int, status: int) -> None:
    """The proxy responds in place of the second page of the list of repositories. The import repeats the request. If
    the proxy responds to all attempts, the old registry is down; it is not a registry without such a list."""
    left = pages

    def reply(head: str) -> bytes:
        nonlocal left
        path = head.split()[1]
        if "/_catalog" not in path:
            return answer(200)
        if "last=" not in path:
            return answer(200, '{"repositories": ["A"]}', Link='</v2/_catalog?last=A>; rel="next"')
        left -= 1
        return answer(status, "a page\n") if left >= 0 else answer(200, '{"repositories": ["B"]}')

    async with scripted_server(reply) as script:
        if pages == 100:
            with pytest.raises(OldRegistryDown, match="run the import again later"):
                await run_import(url=script.url, repositories=None)
        else:
            await run_import(url=script.url, repositories=None)
    # The names are not valid here, so each is a problem.
    assert [name for name, _ in run_import.reports()] == ["A:", "B:"][: 1 if pages == 100 else 2]


async def test_a_token_service_that_refuses_anonymous_clients(
    old_registry: Hub, run_import: ImportRun, content: UpstreamContent, pauses: Pauses
) -> None:
    """Without a login, private repositories are problems. They are no sign that the old registry is down, and the
    requests are not repeated."""
    names = [f"private{number}" for number in range(2 * FAILURES_TO_END)]
    for name in [*names, "public"]:
        content.add(name, noise_image("image", 10), "1")
    old_registry.put(content)
    old_registry.set(auth="bearer", private=tuple(names), username="ann", password="secret")

    result = await run_import(repositories=[*names, "public"])

    assert (result["tags"], result["problems"], pauses) == (1, len(names), [])


@pytest.mark.slow
async def test_a_broken_repository_does_not_end_the_import(
    store: StoredRegistry, old_registry: Hub, run_import: ImportRun, content: UpstreamContent, pauses: Pauses
) -> None:
    """The old registry responds with 500 to all requests for the manifests of one repository with many tags. They are
    problems, and the other repositories are imported. After FAILURES_TO_END failed requests, each further request for
    this repository is retried only once."""
    count = FAILURES_TO_END + 4
    for number in range(count):
        content.add("broken", noise_image(f"broken {number}", 10), f"{number:02}")
    image = content.add(APP, noise_image("image", 10), "1")
    old_registry.put(content)
    old_registry.fault(on="manifest", method="", match="/broken/", status=500, times=None)

    result = await run_import(repositories=["broken", str(APP)], jobs=1)

    assert (result["tags"], result["problems"]) == (1, count)
    assert len(pauses) == 4 * FAILURES_TO_END + 4
    await assert_complete(store, APP, image)


@pytest.mark.slow
async def test_many_broken_repositories_end_the_import(
    old_registry: Hub, run_import: ImportRun, content: UpstreamContent
) -> None:
    """The storage of the old registry is down: GET /v2/ works, but requests for lists of tags get 500. The import ends
    after FAILURES_TO_END repositories."""
    names = [f"app{number:02}" for number in range(2 * FAILURES_TO_END)]
    for name in names:
        content.add(name, noise_image("image", 10), "1")
    old_registry.put(content)
    old_registry.fault(on="tags", method="", status=500, times=None)
    with pytest.raises(OldRegistryDown, match="answers 500"):
        await run_import(repositories=names)
    assert len(run_import.reports()) == FAILURES_TO_END - 1


async def test_a_broken_referrer_does_not_keep_the_others_out(
    store: StoredRegistry, old_registry: Hub, run_import: ImportRun, content: UpstreamContent
) -> None:
    """If one referrer of an image cannot be read, it is a problem, and the other referrers are imported."""
    image = content.add(APP, noise_image("image", 10), "1")
    referrers = [content.add(APP, noise_image(f"signature {number}", 10, subject=image)) for number in range(3)]
    broken, *sound = sorted(each.digest for each in referrers)
    old_registry.put(content)
    old_registry.fault(on="manifest", method="", match=broken, status=500, times=None)

    await run_import()

    [(name, reason)] = run_import.reports()
    assert (name, reason) == (f"team/app:{broken}", f"the upstream registry {old_registry.url} answers 500")
    assert await imported_referrers(store, image) == sound


@pytest.mark.parametrize("auth", ["basic", "bearer"])
@pytest.mark.slow
async def test_a_refused_login_ends_the_import(
    old_registry: Hub, run_import: ImportRun, monkeypatch: pytest.MonkeyPatch, auth: str
) -> None:
    """Each refusal can be a failed login, after which the old registry may lock the account. So the import ends after
    MAX_REFUSED_REQUESTS requests, with an error that says what to do."""
    monkeypatch.setenv("OLD_PASSWORD", "expired")
    old_registry.set(auth=auth, username="ann", password="secret")
    names = [f"app{number}" for number in range(2 * MAX_REFUSED_REQUESTS)]
    with pytest.raises(ImportInvalid, match=r"refuses the login.* check the user name and the password"):
        await run_import(repositories=names, username="ann", password_env="OLD_PASSWORD")
    assert len(run_import.reports()) == MAX_REFUSED_REQUESTS - 1
