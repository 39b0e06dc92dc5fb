"""Tests of `entrepot mirror status`, `refresh` and `purge` with a fake upstream, some of them while a server runs."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path

import httpx2
import pytest

from tests.fakes.commands import entrepot, entrepot_output, error_line
from tests.fakes.hub.hub import Hub
from tests.fakes.plain_client import plain_client, plain_request
from tests.fakes.server_process import running_server
from tests.fakes.upstream_content import ImageTree, UpstreamContent, noise_image
from tests.system.cli.mirror.conftest import FOR_AMD64, digests_served, output_of, run_mirror, settings, status


def size(*images: ImageTree) -> int:
    """Returns the size of the blobs of these images in bytes. A blob that several images have counts once."""
    return sum({digest: blob.size for each in images for digest, blob in each.blobs.items()}.values())


# status


def test_status(tmp_path: Path, upstream: Hub, images: dict[str, ImageTree]) -> None:
    """The status shows the cached content of each upstream and the number of requests that the upstream still allows,
    as JSON and as a table."""
    upstream.set(limit=100)
    output_of(tmp_path, "warm", "app:1", "team/tool:2", *FOR_AMD64)
    (upstream_status,) = status(tmp_path)["upstreams"]
    tool = noise_image("tool", 500)
    assert (upstream_status["name"], upstream_status["default"], upstream_status["endpoints"]) == (
        "docker.io",
        True,
        [upstream.url],
    )
    assert (
        upstream_status["repositories"],
        upstream_status["tags"],
        upstream_status["stale"],
        upstream_status["manifests"],
    ) == (2, 2, 0, 3)
    assert (upstream_status["blobs"], upstream_status["size"]) == (5, size(images["amd64"], tool))
    assert upstream_status["allowance"]["limit"] == 100
    assert upstream_status["allowance"]["remaining"] == 97
    table = "\n".join(output_of(tmp_path, "status"))
    assert "docker.io (default)" in table
    assert "97 of 100" in table
    assert "\x1b" not in table


def test_status_shows_the_pause_after_a_429(tmp_path: Path, upstream: Hub) -> None:
    """After a 429 from the upstream, the status shows until when the mirror sends it no requests. An upstream with two
    endpoints counts as paused only if both are paused."""
    upstream.set(limit=0, retry_after=600)
    started_at = time.time()
    assert "wants fewer requests" in error_line(run_mirror(tmp_path, "refresh", "app:1"), 1)
    (upstream_status,) = status(tmp_path)["upstreams"]
    assert started_at + 599 < upstream_status["allowance"]["until"] < time.time() + 600
    assert upstream_status["allowance"]["remaining"] == 0
    assert "none until " in "\n".join(output_of(tmp_path, "status"))
    text = (tmp_path / "entrepot.toml").read_text()
    (tmp_path / "entrepot.toml").write_text(text.replace("endpoints = [", 'endpoints = ["http://127.0.0.2:1", '))
    (upstream_status,) = status(tmp_path)["upstreams"]
    assert upstream_status["allowance"]["until"] is None


def test_status_counts_stale_tags(tmp_path: Path, upstream: Hub) -> None:
    """A tag past its time to live counts as stale. The command sends no request to the upstream."""
    output_of(tmp_path, "warm", "app:1", *FOR_AMD64)
    (tmp_path / "entrepot.toml").write_text(settings(upstream).replace('"1h"', '"0s"'))
    upstream.forget()  # the requests so far
    assert status(tmp_path)["upstreams"][0]["stale"] == 1
    assert upstream.requests() == []


def test_status_without_a_data_directory(tmp_path: Path, upstream: Hub) -> None:
    """Without a data directory, the command fails and creates none."""
    assert "no data directory" in error_line(run_mirror(tmp_path, "status"), 1)
    assert not (tmp_path / "data").exists()


# refresh


def test_refresh(tmp_path: Path, upstream: Hub, images: dict[str, ImageTree]) -> None:
    """The command requests the tag from the upstream although the cached tag is fresh, and reports whether it has
    changed. The content of a digest never changes, so it is not requested again."""
    first, second = images["index"].digest, noise_image("second", 10)
    assert output_of(tmp_path, "refresh", "app:1") == [f"app:1: new here: {first}"]
    upstream.forget()
    assert output_of(tmp_path, "refresh", "app:1") == [f"app:1: unchanged: {first}"]
    assert [request.method for request in upstream.requests("manifest")] == ["HEAD"]
    content = UpstreamContent()
    content.add("library/app", second, "1")
    upstream.put(content)
    assert output_of(tmp_path, "refresh", "app:1") == [f"app:1: changed: {first} -> {second.digest}"]
    assert output_of(tmp_path, "refresh", f"app@{first}") == [
        f"app@{first}: cached; the content of a digest never changes"
    ]


@pytest.mark.parametrize("by_digest", [False, True])
def test_refresh_allows_a_new_request_after_corrupt_bytes(
    tmp_path: Path, upstream: Hub, images: dict[str, ImageTree], by_digest: bool
) -> None:
    """The upstream has sent a layer with corrupt bytes several times, so the mirror does not request the layer again
    for a while. After `refresh`, the mirror can request it at once. `refresh` accepts the tag of the image, or the
    reference that the error names."""
    layer = images["amd64"].layers[1].digest
    upstream.fault(on="blob", match=layer, corrupt=5, times=None)  # changes the byte at offset 5
    with (
        running_server(tmp_path, "--config", str(tmp_path / "entrepot.toml")) as server,
        plain_client(server.url) as client,
    ):
        client.get("/v2/app/manifests/1").raise_for_status()
        client.get(f"/v2/app/manifests/{images['amd64'].digest}").raise_for_status()
        refused = None
        while refused is None or int(refused.headers["retry-after"]) < 4:  # from the third failure on, it is 4 or more
            refused = get(client, f"/v2/app/blobs/{layer}")
        upstream.clear()  # from now on, the upstream sends the right bytes
        assert client.get(f"/v2/app/blobs/{layer}").status_code == 502
        message = refused.json()["errors"][0]["message"]
        reference = message.split()[-1] if by_digest else "app:1"
        (line,) = output_of(tmp_path, "refresh", reference)
        assert "unblocked 1 blob, for which the upstream had sent corrupt bytes" in line
        answer = client.get(f"/v2/app/blobs/{layer}")
        assert answer.content == images["amd64"].layers[1].read()


def get(client: httpx2.Client, path: str) -> httpx2.Response | None:
    """Returns the response, or None if the connection broke."""
    with suppress(httpx2.TransportError):
        return client.get(path)
    return None


def test_refresh_of_a_tag_that_the_upstream_has_deleted(
    tmp_path: Path, upstream: Hub, images: dict[str, ImageTree]
) -> None:
    """If the upstream has deleted the tag, the error is one line, and the mirror deletes its cached tag."""
    output_of(tmp_path, "refresh", "app:1")
    upstream.remove("library/app", "1")
    error = error_line(run_mirror(tmp_path, "refresh", "app:1"), 1)
    assert error.startswith("app:1: the tag no longer exists: ")
    assert error.endswith(f"it pointed at {images['index'].digest}")
    assert status(tmp_path)["upstreams"][0]["tags"] == 0


def test_refresh_when_the_upstream_is_off(tmp_path: Path, upstream: Hub) -> None:
    """If the upstream is down, the error is one line. The cached tag stays, and is as fresh as before."""
    output_of(tmp_path, "refresh", "app:1")
    upstream.refuse()
    assert "is served as it was" in error_line(run_mirror(tmp_path, "refresh", "app:1"), 1)
    (upstream_status,) = status(tmp_path)["upstreams"]
    assert (upstream_status["tags"], upstream_status["stale"]) == (1, 0)


def test_refresh_while_a_server_runs(tmp_path: Path, upstream: Hub, images: dict[str, ImageTree]) -> None:
    """After a refresh, all workers of a server on the same data directory serve the new manifest without a request to
    the upstream. If the upstream has deleted the tag, all workers respond with 404."""
    with running_server(tmp_path, "--config", str(tmp_path / "entrepot.toml"), "--workers", "2") as server:
        assert digests_served(server) == {images["index"].digest}
        second = noise_image("second", 10)
        content = UpstreamContent()
        content.add("library/app", second, "1")
        upstream.put(content)
        assert digests_served(server) == {images["index"].digest}
        output_of(tmp_path, "refresh", "app:1")
        upstream.forget()
        assert digests_served(server) == {second.digest}
        upstream.remove("library/app", "1")
        assert run_mirror(tmp_path, "refresh", "app:1").returncode == 1
        upstream.forget()
        assert {plain_request("HEAD", f"{server.url}/v2/app/manifests/1").status_code for _ in range(16)} == {404}
        assert upstream.count() == 0


# purge


def test_purge_a_tag(tmp_path: Path, upstream: Hub, images: dict[str, ImageTree]) -> None:
    """`purge` deletes the cached tag and its manifests. The output says how many bytes garbage collection will free and
    when, unless a pull fetches the manifests again before. The audit log names the user who ran the command. The next
    request for the tag fetches it from the upstream again."""
    output_of(tmp_path, "warm", "app:1", *FOR_AMD64)
    (line,) = output_of(tmp_path, "purge", "app:1")
    assert line.startswith("app:1: dropped 1 tag and 2 manifests; 3.0 MiB are freed after ")
    assert line.endswith("(gc.grace is 24h), unless a pull uses the blobs before then")
    assert status(tmp_path)["upstreams"][0]["manifests"] == 0
    (deletion,) = json.loads(entrepot_output("audit", "--action", "tag.delete", "--json", folder=tmp_path))
    assert deletion["actor"].startswith("cli:")
    upstream.forget()
    output_of(tmp_path, "refresh", "app:1")
    assert upstream.count("manifest", "GET") == 1


def test_purge_while_a_server_runs(tmp_path: Path, upstream: Hub, images: dict[str, ImageTree]) -> None:
    """While a server runs on the same data directory, `purge` deletes a tag and its manifests. The server fetches them
    from the upstream at the next request. A client that is reading a layer at that moment gets the whole layer."""
    layer = images["amd64"].layers[1]
    with (
        running_server(tmp_path, "--config", str(tmp_path / "entrepot.toml"), "--workers", "2") as server,
        plain_client(server.url) as client,
    ):
        output_of(tmp_path, "warm", "app:1", *FOR_AMD64)
        upstream.forget()
        with client.stream("GET", f"/v2/app/blobs/{layer.digest}") as reading:
            body = reading.iter_raw()
            first_bytes = next(body)
            output_of(tmp_path, "purge", "app:1")
            assert first_bytes + b"".join(body) == layer.read()
        assert upstream.count() == 0
        assert digests_served(server) == {images["index"].digest}
        assert digests_served(server, f"/v2/app/manifests/{images['amd64'].digest}") == {images["amd64"].digest}
        assert upstream.count("manifest", "GET") == 2
        assert client.get(f"/v2/app/blobs/{layer.digest}").content == layer.read()


def test_purge_a_repository(tmp_path: Path, upstream: Hub) -> None:
    """`purge --all` deletes all cached tags and manifests of a repository. Other repositories stay."""
    output_of(tmp_path, "warm", "app:1", "app:latest", "team/tool:2", "--all-platforms")
    (line,) = output_of(tmp_path, "purge", "--all", "app")
    assert line.startswith("app: dropped 2 tags and 3 manifests; 4.0 MiB are freed after ")
    (upstream_status,) = status(tmp_path)["upstreams"]
    assert (upstream_status["repositories"], upstream_status["tags"]) == (1, 1)


def test_purge_of_content_that_is_not_cached(tmp_path: Path, upstream: Hub) -> None:
    """`purge` of a tag or a repository that is not cached fails with one line, and sends no request to the upstream."""
    output_of(tmp_path, "warm", "app:1", *FOR_AMD64)
    upstream.forget()
    assert "has no manifest 2" in error_line(run_mirror(tmp_path, "purge", "app:2"), 1)
    assert "there is no repository" in error_line(run_mirror(tmp_path, "purge", "--all", "team/tool"), 1)
    assert upstream.requests() == []


# errors


def test_hosted_repositories_are_refused(tmp_path: Path, upstream: Hub) -> None:
    """The commands refuse hosted repositories, because these have no upstream."""
    (tmp_path / "entrepot.toml").write_text(settings(upstream, '[hosted]\nprefixes = ["ours/**"]\n'))
    for command in ("warm", "refresh"):
        result = run_mirror(tmp_path, command, "ours/app:1")
        assert result.returncode == 1
        assert "ours/app is hosted here" in result.stderr
    assert "ours/app is hosted here" in error_line(run_mirror(tmp_path, "purge", "ours/app:1"), 1)
    assert upstream.requests() == []


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (["warm"], "name what to fetch"),
        (["warm", "App:1"], "App:1: 'App' is not a repository name"),
        (["warm", "app:1", "--platform", "amd64"], "--platform: 'amd64' is not a platform like linux/amd64"),
        (["warm", "app:1", "--platform", "linux/amd64", "--all-platforms"], "contradict each other"),
        (["warm", "--file", "none.txt"], "none.txt: cannot read the references: no such file or directory"),
        (["warm", "--file", "two.txt"], "two.txt: line 2 has more than one reference: app:1 app:2"),
        (["refresh", "app:"], "app:: 'app:' ends without a tag"),
        (["purge", "--all", "app:1"], "app:1: --all takes a name without tag and digest"),
    ],
)
def test_wrong_arguments_get_an_error_of_one_line(tmp_path: Path, args: list[str], error: str) -> None:
    """For an invalid reference, platform or file, the error is one line and the exit code is 2. The data directory is
    not opened."""
    (tmp_path / "two.txt").write_text("# two\napp:1 app:2\n")
    assert error in error_line(entrepot("mirror", *args, "--mirror", "docker.io", folder=tmp_path), 2)
    assert not (tmp_path / "data").exists()


def test_commands_fail_without_an_upstream(tmp_path: Path) -> None:
    """If the settings have no upstream, each command fails, and the error says how to name an upstream."""
    for command in (["warm", "app"], ["status"], ["refresh", "app"], ["purge", "app"]):
        error = error_line(entrepot("mirror", *command, folder=tmp_path), 2)
        assert error.startswith("nothing is mirrored: name an upstream with --mirror docker.io")
