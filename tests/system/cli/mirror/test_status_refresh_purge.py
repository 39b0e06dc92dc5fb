"""`entrepot mirror status|refresh|purge`, with an upstream over HTTP and with a running server."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

import httpx2
import pytest

from tests.fakes.commands import entrepot, error_line
from tests.fakes.hub.hub import Hub
from tests.fakes.plain_client import plain_client, plain_request
from tests.fakes.server_process import running_server
from tests.fakes.upstream_content import ImageTree, UpstreamContent, noise_image
from tests.system.cli.mirror.conftest import FOR_AMD64, digests_served, done, mirror, settings, status


def size(*holdings: ImageTree) -> int:
    return sum({digest: blob.size for each in holdings for digest, blob in each.blobs.items()}.values())


# status


def test_status(tmp_path: Path, upstream: Hub, images: dict[str, ImageTree]) -> None:
    """The status shows what is cached of each upstream and how many requests are left, as JSON and as a table."""
    upstream.set(limit=100)
    done(tmp_path, "warm", "app:1", "team/tool:2", *FOR_AMD64)
    (seen,) = status(tmp_path)["upstreams"]
    tool = noise_image("tool", 500)
    assert (seen["name"], seen["default"], seen["endpoints"]) == ("docker.io", True, [upstream.url])
    assert (seen["repositories"], seen["tags"], seen["stale"], seen["manifests"]) == (2, 2, 0, 3)
    assert (seen["blobs"], seen["size"]) == (5, size(images["amd64"], tool))
    assert seen["allowance"]["limit"] == 100
    assert seen["allowance"]["remaining"] == 97
    table = "\n".join(done(tmp_path, "status"))
    assert "docker.io (default)" in table
    assert "97 of 100" in table
    assert "\x1b" not in table


def test_status_of_a_limit(tmp_path: Path, upstream: Hub) -> None:
    """After a 429, all commands show the pause until it is over. An upstream with several endpoints is paused only if
    all of them are."""
    upstream.set(limit=0, retry_after=600)
    before = time.time()
    assert "wants fewer requests" in error_line(mirror(tmp_path, "refresh", "app:1"), 1)
    (seen,) = status(tmp_path)["upstreams"]
    assert before + 599 < seen["allowance"]["until"] < time.time() + 600
    assert seen["allowance"]["remaining"] == 0
    assert "none until " in "\n".join(done(tmp_path, "status"))
    text = (tmp_path / "entrepot.toml").read_text()
    (tmp_path / "entrepot.toml").write_text(text.replace("endpoints = [", 'endpoints = ["http://127.0.0.2:1", '))
    (seen,) = status(tmp_path)["upstreams"]
    assert seen["allowance"]["until"] is None


def test_status_counts_stale_tags(tmp_path: Path, upstream: Hub) -> None:
    """A tag past its time to live counts as stale. The command does not ask the upstream."""
    done(tmp_path, "warm", "app:1", *FOR_AMD64)
    (tmp_path / "entrepot.toml").write_text(settings(upstream).replace('"1h"', '"0s"'))
    upstream.forget()
    assert status(tmp_path)["upstreams"][0]["stale"] == 1
    assert upstream.requests() == []


def test_status_of_nothing(tmp_path: Path, upstream: Hub) -> None:
    """Without a data directory, the command creates none."""
    assert "no data directory" in error_line(mirror(tmp_path, "status"), 1)
    assert not (tmp_path / "data").exists()


# refresh


def test_refresh(tmp_path: Path, upstream: Hub, images: dict[str, ImageTree]) -> None:
    """The command asks the upstream although the tag is fresh. From then on, the new manifest is served."""
    first, second = images["index"].digest, noise_image("second", 10)
    assert done(tmp_path, "refresh", "app:1") == [f"app:1: new here: {first}"]
    upstream.forget()
    assert done(tmp_path, "refresh", "app:1") == [f"app:1: unchanged: {first}"]
    assert [seen.method for seen in upstream.requests("manifest")] == ["HEAD"]
    content = UpstreamContent()
    content.add("library/app", second, "1")
    upstream.put(content)
    assert done(tmp_path, "refresh", "app:1") == [f"app:1: changed: {first} -> {second.digest}"]
    assert done(tmp_path, "refresh", f"app@{first}") == [f"app@{first}: cached; the content of a digest never changes"]


@pytest.mark.parametrize("by_digest", [False, True])
def test_refresh_after_wrong_bytes(
    tmp_path: Path, upstream: Hub, images: dict[str, ImageTree], by_digest: bool
) -> None:
    """A layer that came with corrupt bytes several times is not fetched for a while. After the command, every worker
    can fetch it at once. The command accepts the image, or the reference in the error."""
    layer = images["amd64"].layers[1].digest
    upstream.fault(on="blob", match=layer, corrupt=5, times=None)
    with (
        running_server(tmp_path, "--config", str(tmp_path / "entrepot.toml")) as server,
        plain_client(server.url) as client,
    ):
        client.get("/v2/app/manifests/1").raise_for_status()
        client.get(f"/v2/app/manifests/{images['amd64'].digest}").raise_for_status()
        refused = None
        while refused is None or int(refused.headers["retry-after"]) < 4:  # seconds; after the third fetch
            refused = get(client, f"/v2/app/blobs/{layer}")
        upstream.clear()
        assert client.get(f"/v2/app/blobs/{layer}").status_code == 502
        sentence = refused.json()["errors"][0]["message"]
        reference = sentence.split()[-1] if by_digest else "app:1"
        (said,) = done(tmp_path, "refresh", reference)
        assert "1 blob that came with corrupt bytes can be requested again at once" in said
        got = client.get(f"/v2/app/blobs/{layer}")
        assert got.content == images["amd64"].layers[1].read()


def get(client: httpx2.Client, path: str) -> httpx2.Response | None:
    """Returns the response; None if it was cut off."""
    with suppress(httpx2.TransportError):
        return client.get(path)
    return None


def test_refresh_of_a_tag_that_is_gone(tmp_path: Path, upstream: Hub, images: dict[str, ImageTree]) -> None:
    """If the upstream has deleted the tag, the error is one line, and the cached tag is deleted."""
    done(tmp_path, "refresh", "app:1")
    upstream.remove("library/app", "1")
    said = error_line(mirror(tmp_path, "refresh", "app:1"), 1)
    assert said.startswith("app:1: it is gone: ")
    assert said.endswith(f"it was {images['index'].digest}")
    assert status(tmp_path)["upstreams"][0]["tags"] == 0


def test_refresh_when_the_upstream_is_off(tmp_path: Path, upstream: Hub) -> None:
    """If the upstream is down, the error is one line. The cached tag stays, and is as fresh as before."""
    done(tmp_path, "refresh", "app:1")
    upstream.refuse()
    assert "is served as it was" in error_line(mirror(tmp_path, "refresh", "app:1"), 1)
    (seen,) = status(tmp_path)["upstreams"]
    assert (seen["tags"], seen["stale"]) == (1, 0)


def test_refresh_beside_a_server(tmp_path: Path, upstream: Hub, images: dict[str, ImageTree]) -> None:
    """All workers of a server on the same data directory serve the result of the refresh without asking the upstream. A
    tag that the upstream has deleted is gone there as well."""
    with running_server(tmp_path, "--config", str(tmp_path / "entrepot.toml"), "--workers", "2") as server:
        assert digests_served(server) == {images["index"].digest}
        second = noise_image("second", 10)
        content = UpstreamContent()
        content.add("library/app", second, "1")
        upstream.put(content)
        assert digests_served(server) == {images["index"].digest}
        done(tmp_path, "refresh", "app:1")
        upstream.forget()
        assert digests_served(server) == {second.digest}
        upstream.remove("library/app", "1")
        assert mirror(tmp_path, "refresh", "app:1").returncode == 1
        upstream.forget()
        assert {plain_request("HEAD", f"{server.url}/v2/app/manifests/1").status_code for _ in range(16)} == {404}
        assert upstream.count() == 0


# purge


def test_purge_a_tag(tmp_path: Path, upstream: Hub, images: dict[str, ImageTree]) -> None:
    """The cached copy is deleted. The output says how many bytes are freed, and when. The next pull fetches the tag
    again."""
    done(tmp_path, "warm", "app:1", *FOR_AMD64)
    (line,) = done(tmp_path, "purge", "app:1")
    assert line.startswith("app:1: dropped 1 tag and 2 manifests; 3.0 MiB are freed after ")
    assert line.endswith("(gc.grace is 24h), unless a pull uses them again before")
    assert status(tmp_path)["upstreams"][0]["manifests"] == 0
    upstream.forget()
    done(tmp_path, "refresh", "app:1")
    assert upstream.count("manifest", "GET") == 1


def test_purge_beside_a_server(tmp_path: Path, upstream: Hub, images: dict[str, ImageTree]) -> None:
    """A server on the same data directory no longer has the deleted tag and manifests, and fetches them at the next
    request. A client that is reading a layer gets all of it."""
    layer = images["amd64"].layers[1]
    with (
        running_server(tmp_path, "--config", str(tmp_path / "entrepot.toml"), "--workers", "2") as server,
        plain_client(server.url) as client,
    ):
        done(tmp_path, "warm", "app:1", *FOR_AMD64)
        upstream.forget()
        with client.stream("GET", f"/v2/app/blobs/{layer.digest}") as reading:
            body = reading.iter_raw()
            begun = next(body)
            done(tmp_path, "purge", "app:1")
            assert begun + b"".join(body) == layer.read()
        assert upstream.count() == 0
        assert digests_served(server) == {images["index"].digest}
        assert digests_served(server, f"/v2/app/manifests/{images['amd64'].digest}") == {images["amd64"].digest}
        assert upstream.count("manifest", "GET") == 2
        assert client.get(f"/v2/app/blobs/{layer.digest}").content == layer.read()


def test_purge_a_repository(tmp_path: Path, upstream: Hub) -> None:
    """With --all, the whole repository is deleted from the cache. Other repositories stay."""
    done(tmp_path, "warm", "app:1", "app:latest", "team/tool:2", "--all-platforms")
    (line,) = done(tmp_path, "purge", "--all", "app")
    assert line.startswith("app: dropped 2 tags and 3 manifests; 4.0 MiB are freed after ")
    (seen,) = status(tmp_path)["upstreams"]
    assert (seen["repositories"], seen["tags"]) == (1, 1)


def test_purge_what_is_not_here(tmp_path: Path, upstream: Hub) -> None:
    """Each error is one line, and the upstream is not asked."""
    done(tmp_path, "warm", "app:1", *FOR_AMD64)
    upstream.forget()
    assert "has no manifest 2" in error_line(mirror(tmp_path, "purge", "app:2"), 1)
    assert "there is no repository" in error_line(mirror(tmp_path, "purge", "--all", "team/tool"), 1)
    assert upstream.requests() == []


# what is wrong


def test_hosted_names_are_left_alone(tmp_path: Path, upstream: Hub) -> None:
    """The commands refuse hosted repositories, because these have no upstream."""
    (tmp_path / "entrepot.toml").write_text(settings(upstream, '[hosted]\nprefixes = ["ours/**"]\n'))
    for command in ("warm", "refresh"):
        ended = mirror(tmp_path, command, "ours/app:1")
        assert ended.returncode == 1
        assert "ours/app is hosted here" in ended.stderr
    assert "ours/app is hosted here" in error_line(mirror(tmp_path, "purge", "ours/app:1"), 1)
    assert upstream.requests() == []


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["warm"], "name what to fetch"),
        (["warm", "App:1"], "App:1: 'App' is not a repository name"),
        (["warm", "app:1", "--platform", "amd64"], "--platform: 'amd64' is not a platform like linux/amd64"),
        (["warm", "app:1", "--platform", "linux/amd64", "--all-platforms"], "contradict each other"),
        (["warm", "--file", "none.txt"], "none.txt: cannot read the references: no such file or directory"),
        (["warm", "--file", "two.txt"], "two.txt: line 2: one reference a line, please: app:1 app:2"),
        (["refresh", "app:"], "app:: 'app:' ends without a tag"),
        (["purge", "--all", "app:1"], "app:1: --all takes a name without tag and digest"),
    ],
)
def test_wrong_use_in_one_line(tmp_path: Path, args: list[str], said: str) -> None:
    """For an invalid reference, platform or file, the error is one line and the exit code is 2. The data directory is
    not opened."""
    (tmp_path / "two.txt").write_text("# two\napp:1 app:2\n")
    assert said in error_line(entrepot("mirror", *args, "--mirror", "docker.io", folder=tmp_path), 2)
    assert not (tmp_path / "data").exists()


def test_nothing_is_mirrored(tmp_path: Path) -> None:
    """Without an upstream in the settings, the error of each command says how to name one."""
    for command in (["warm", "app"], ["status"], ["refresh", "app"], ["purge", "app"]):
        said = error_line(entrepot("mirror", *command, folder=tmp_path), 2)
        assert said.startswith("nothing is mirrored: name an upstream with --mirror docker.io")
