"""`entrepot mirror warm|status|refresh|purge`, with an upstream over HTTP and with a running server."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest

from storage.composition import list_partials
from tests.fakes.client_images import MIB
from tests.fakes.commands import STACK_DUMP, entrepot, error_line, wait_for_output
from tests.fakes.hub.hub import Hub, hub, repeated, union
from tests.fakes.plain_client import plain_client
from tests.fakes.server_process import ROOT, RegistryServer, running_server
from tests.fakes.upstream_content import ImageTree, UpstreamContent, index_of, noise_image

FOR_AMD64 = ("--platform", "linux/amd64")


@pytest.fixture
def images() -> dict[str, ImageTree]:
    """An index of two images for two platforms, and an image without an index."""
    amd64, arm64 = noise_image("amd64", 1000, 3 * MIB), noise_image("arm64", 2000, MIB, architecture="arm64")
    return {"amd64": amd64, "arm64": arm64, "index": index_of((amd64, "amd64"), (arm64, "arm64"))}


@pytest.fixture
def upstream(tmp_path: Path, images: dict[str, ImageTree]) -> Iterator[Hub]:
    content = UpstreamContent()
    content.add("library/app", images["index"], "1", "latest")
    content.add("team/tool", noise_image("tool", 500), "2")
    with hub(tmp_path, content) as running:
        (tmp_path / "entrepot.toml").write_text(settings(running))
        yield running


def settings(upstream: Hub, more: str = "") -> str:
    return f'[[upstream]]\nname = "docker.io"\ndefault = true\nendpoints = ["{upstream.url}"]\ntag_ttl = "1h"\n{more}'


def mirror(folder: Path, *args: str | Path) -> subprocess.CompletedProcess[str]:
    return entrepot("mirror", *args, "--config", "entrepot.toml", folder=folder)


def done(folder: Path, *args: str | Path) -> list[str]:
    """Returns the output lines of a command that must succeed."""
    ended = mirror(folder, *args)
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout.splitlines()


def status(folder: Path) -> dict[str, Any]:
    seen: dict[str, Any] = json.loads("\n".join(done(folder, "status", "--json")))
    return seen


def blobs_asked_for(upstream: Hub) -> set[str | None]:
    return {seen.digest for seen in upstream.requests("blob", "GET")}


def size(*holdings: ImageTree) -> int:
    return sum({digest: blob.size for each in holdings for digest, blob in each.blobs.items()}.values())


# warm


def test_warm_brings_one_platform(tmp_path: Path, upstream: Hub, images: dict[str, ImageTree]) -> None:
    """The manifests, config and layers of the chosen platform are fetched, each byte once, and nothing of other
    platforms."""
    lines = done(tmp_path, "warm", "app:1", *FOR_AMD64)
    assert lines[0] == "app:1: 2 manifests, 3 blobs: 3.0 MiB fetched, 0 B were here"
    assert lines[1].startswith("1 reference here; 3.0 MiB fetched, 0 B were here before, ")
    assert blobs_asked_for(upstream) == set(images["amd64"].blobs)
    for digest, blob in images["amd64"].blobs.items():
        assert repeated(upstream.sent(digest)) == []
        assert union(upstream.sent(digest)) == [(0, blob.size)]
    assert upstream.count("manifest", "GET") == 2


def test_warm_again_fetches_nothing(tmp_path: Path, upstream: Hub) -> None:
    """Cached content is not fetched again."""
    done(tmp_path, "warm", "app:1", *FOR_AMD64)
    upstream.forget()
    assert done(tmp_path, "warm", "app:1", *FOR_AMD64)[0].endswith(" 0 B fetched, 3.0 MiB were here")
    assert upstream.requests() == []


def test_warm_several_platforms(tmp_path: Path, upstream: Hub, images: dict[str, ImageTree]) -> None:
    """--platform can be repeated, and --all-platforms fetches all that the index lists."""
    done(tmp_path, "warm", "app:1", "--platform", "linux/arm64", *FOR_AMD64)
    assert blobs_asked_for(upstream) == set(images["index"].blobs)
    done(tmp_path, "purge", "--all", "app")
    assert done(tmp_path, "warm", "app:1", "--all-platforms")[0].startswith("app:1: 3 manifests, 6 blobs: ")


def test_warm_by_digest_and_other_names(tmp_path: Path, upstream: Hub, images: dict[str, ImageTree]) -> None:
    """References are those of a pull: by digest, with the upstream's name, with `library/`. The same image is fetched
    once."""
    digest = images["arm64"].digest
    lines = done(tmp_path, "warm", f"docker.io/library/app@{digest}", f"app@{digest}", "docker.io/team/tool:2")
    assert lines[-1].startswith("3 references here; ")
    assert blobs_asked_for(upstream) >= set(images["arm64"].blobs)
    assert all(repeated(upstream.sent(digest)) == [] for digest in images["arm64"].blobs)


def test_warmed_images_are_served_without_upstream(tmp_path: Path, upstream: Hub, images: dict[str, ImageTree]) -> None:
    """A server on the same data directory serves the images at once, even if the upstream is down."""
    with running_server(tmp_path, "--config", str(tmp_path / "entrepot.toml")) as server:
        done(tmp_path, "warm", "app:1", *FOR_AMD64)
        upstream.refuse()
        with plain_client(server.url) as client:
            assert client.get("/v2/app/manifests/1").content == images["index"].body
            assert client.get(f"/v2/app/manifests/{images['amd64'].digest}").content == images["amd64"].body
            for digest, blob in images["amd64"].blobs.items():
                assert client.get(f"/v2/app/blobs/{digest}").content == blob.read()


def test_warm_beside_a_server_that_fetches(tmp_path: Path, upstream: Hub, images: dict[str, ImageTree]) -> None:
    """The command waits for what the server is just fetching for a client, and does not fetch it twice."""
    layer = images["amd64"].layers[1]
    upstream.fault(on="blob", match=layer.digest, stall_after=MIB)
    with (
        running_server(tmp_path, "--config", str(tmp_path / "entrepot.toml")) as server,
        plain_client(server.url) as client,
        ThreadPoolExecutor() as threads,
    ):
        client.get(f"/v2/app/manifests/{images['amd64'].digest}").raise_for_status()
        pulled = threads.submit(client.get, f"/v2/app/blobs/{layer.digest}")
        upstream.wait(1, "blob", digest=layer.digest)
        with started(tmp_path, "warm", "app:1", *FOR_AMD64) as running:
            upstream.wait(1, "manifest", match="manifests/1")
            upstream.release()
            out, err = wait_for_output(running)
        assert pulled.result().content == layer.read()
    assert (running.returncode, err) == (0, "")
    assert out.startswith("app:1: 2 manifests, 3 blobs: ")
    assert repeated(upstream.sent(layer.digest)) == []


def test_warm_says_what_failed(tmp_path: Path, upstream: Hub, images: dict[str, ImageTree]) -> None:
    """Each image that failed is one line with the reason, and the exit code is 1. All others are fetched."""
    ended = mirror(tmp_path, "warm", "app:1", "app:none", "team/none:1", *FOR_AMD64)
    assert ended.returncode == 1
    assert sorted(line.partition(": ")[2].partition(": ")[0] for line in ended.stderr.splitlines()) == [
        "app:none", "team/none:1",
    ]  # fmt: skip
    assert ended.stdout.splitlines()[-1].startswith("1 reference here, 2 not; 3.0 MiB fetched")


def test_warm_says_which_platforms_there_are(tmp_path: Path, upstream: Hub) -> None:
    """For a platform that is not in the index, the error lists those that are. The other platforms are fetched."""
    ended = mirror(tmp_path, "warm", "app:1", "--platform", "linux/s390x", *FOR_AMD64)
    assert ended.returncode == 1
    assert "does not exist for linux/s390x, only for linux/amd64, linux/arm64" in ended.stderr
    assert "3.0 MiB fetched" in ended.stdout


def test_warm_from_a_file(tmp_path: Path, upstream: Hub) -> None:
    """The file has one reference a line. Comments and empty lines are ignored."""
    (tmp_path / "images.txt").write_text("# ours\n\napp:1   # the first\n  team/tool:2\napp:1\n")
    assert done(tmp_path, "warm", "--file", "images.txt", *FOR_AMD64)[-1].startswith("2 references here; ")


def test_warm_what_the_settings_name(tmp_path: Path, upstream: Hub) -> None:
    """Without references the command uses `[warm]`, including its platforms."""
    more = '[warm]\nreferences = ["app:1"]\nplatforms = ["all"]\n'
    (tmp_path / "entrepot.toml").write_text(settings(upstream, more))
    assert done(tmp_path, "warm")[0].startswith("app:1: 3 manifests, 6 blobs: ")


def test_warm_when_the_upstream_is_off(tmp_path: Path, upstream: Hub) -> None:
    """The error is one line that names the upstream. A cached copy that could not be updated is an error too."""
    upstream.refuse()
    said = mirror(tmp_path, "warm", "app:1")
    assert said.returncode == 1
    assert len(said.stderr.splitlines()) == 1
    upstream.listen()
    (tmp_path / "entrepot.toml").write_text(settings(upstream).replace('"1h"', '"0s"'))
    done(tmp_path, "warm", "app:1", *FOR_AMD64)
    upstream.refuse()
    said = mirror(tmp_path, "warm", "app:1", *FOR_AMD64)
    assert said.returncode == 1
    assert "is served as it was" in said.stderr


def test_interrupted_warming_goes_on(tmp_path: Path, upstream: Hub, images: dict[str, ImageTree]) -> None:
    """Ctrl-C ends the command with one line. The next run fetches the rest, and no byte twice."""
    layer = images["amd64"].layers[1]
    upstream.fault(on="blob", match=layer.digest, stall_after=MIB, times=100)
    with started(tmp_path, "warm", "app:1", *FOR_AMD64) as running:
        upstream.wait(1, "blob", digest=layer.digest)
        upstream.until(lambda: any(fill.received >= MIB for fill in list_partials(tmp_path / "data")))
        running.send_signal(signal.SIGINT)
        out, err = wait_for_output(running)
    assert (running.returncode, out) == (130, "")
    assert err.startswith("entrepot: interrupted; what was fetched stays cached")
    upstream.clear()
    upstream.release()
    fills = {fill["digest"]: fill for fill in status(tmp_path)["fills"]}  # a small one may have been on its way as well
    assert (fills[layer.digest]["size"], fills[layer.digest]["running"]) == (layer.size, False)
    assert layer.digest in "\n".join(done(tmp_path, "status"))
    done(tmp_path, "warm", "app:1", *FOR_AMD64)
    assert status(tmp_path)["fills"] == []
    assert union(upstream.sent(layer.digest)) == [(0, layer.size)]


def started(folder: Path, *args: str, stderr: int = subprocess.PIPE) -> subprocess.Popen[str]:
    """Starts the command."""
    return subprocess.Popen(
        [sys.executable, "-m", "registry", "mirror", *args, "--config", "entrepot.toml"],
        cwd=folder,
        env={
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": f"{STACK_DUMP}:{ROOT}",
            "HOME": str(folder),
            "TERM": "xterm",
            "COLUMNS": "120",
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )


def test_warm_after_wrong_bytes(tmp_path: Path, upstream: Hub, images: dict[str, ImageTree]) -> None:
    """A layer whose bytes are corrupt once is fetched again."""
    upstream.fault(on="blob", match=images["amd64"].layers[1].digest, corrupt=5)
    assert done(tmp_path, "warm", "app:1", *FOR_AMD64)[0].startswith("app:1: 2 manifests, 3 blobs: 3.0 MiB fetched")
    assert upstream.faults == 0


def test_bars_in_a_terminal(tmp_path: Path, upstream: Hub, images: dict[str, ImageTree]) -> None:
    """If stderr is a terminal, it shows a bar for each blob that is being fetched. stdout has the same lines as without
    one."""
    layer = images["amd64"].layers[1]
    upstream.fault(on="blob", match=layer.digest, stall_after=MIB, times=100)
    ours, theirs = pty.openpty()
    shown = b""
    with started(tmp_path, "warm", "app:1", *FOR_AMD64, stderr=theirs) as running:
        os.close(theirs)
        while layer.digest[:19].encode() not in shown:
            shown += os.read(ours, 65536)
        upstream.clear()
        upstream.release()
        with suppress(OSError):  # EIO: the other end is closed
            while piece := os.read(ours, 65536):
                shown += piece
        out, _ = wait_for_output(running)
    os.close(ours)
    assert running.returncode == 0
    assert out.splitlines()[0].startswith("app:1: 2 manifests, 3 blobs: 3.0 MiB fetched")
    assert b"\x1b[" in shown


def test_the_schedule(tmp_path: Path, upstream: Hub, images: dict[str, ImageTree]) -> None:
    """The server fetches the images in `[warm]`, and later what their tags point at then. One worker does it for
    all."""
    more = '[warm]\nreferences = ["app:1"]\nplatforms = ["linux/amd64"]\ninterval = "1s"\n'
    (tmp_path / "entrepot.toml").write_text(settings(upstream, more).replace('"1h"', '"0s"'))
    later = noise_image("later", 700)
    with running_server(tmp_path, "--config", str(tmp_path / "entrepot.toml")):
        upstream.until(lambda: blobs_asked_for(upstream) == set(images["amd64"].blobs))
        content = UpstreamContent()
        content.add("library/app", later, "1")
        upstream.put(content)
        upstream.until(lambda: blobs_asked_for(upstream) >= set(later.blobs))
    assert all(repeated(upstream.sent(digest)) == [] for digest in {**images["amd64"].blobs, **later.blobs})


def test_the_schedule_outlives_a_worker(tmp_path: Path, upstream: Hub) -> None:
    """When the worker that fetches is killed, another one continues."""
    more = '[warm]\nreferences = ["app:1"]\nplatforms = ["linux/amd64"]\ninterval = "1s"\n'
    (tmp_path / "entrepot.toml").write_text(settings(upstream, more).replace('"1h"', '"0s"'))
    with running_server(tmp_path, "--config", str(tmp_path / "entrepot.toml")) as server:
        for number in range(3):
            later = noise_image(f"later {number}", 700)
            content = UpstreamContent()
            content.add("library/app", later, "1")
            upstream.put(content)
            upstream.until(partial(asked_for, upstream, later))
            upstream.until(lambda: bool(warming(server)))
            os.kill(warming(server)[0], signal.SIGKILL)


def asked_for(upstream: Hub, image: ImageTree) -> bool:
    return blobs_asked_for(upstream) >= set(image.blobs)


def warming(server: RegistryServer) -> list[int]:
    """Returns the worker that holds the lock for the schedule (proc(5), fdinfo). While something is being fetched,
    other workers may have a lock on that file too."""
    found = []
    for pid in server.worker_pids():
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):
                told = (fd.parent.parent / "fdinfo" / fd.name).read_text()
                if fd.readlink() == server.data / "locks" / "turns" and "OFDLCK" in told:
                    found.append(pid)
    return found


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
    """All commands see a 429 until its time is over. An upstream with several endpoints is limited when all of them
    are."""
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
    """A tag past its time to live is stale. The command does not ask the upstream."""
    done(tmp_path, "warm", "app:1", *FOR_AMD64)
    (tmp_path / "entrepot.toml").write_text(settings(upstream).replace('"1h"', '"0s"'))
    upstream.forget()
    assert status(tmp_path)["upstreams"][0]["stale"] == 1
    assert upstream.requests() == []


def test_status_of_nothing(tmp_path: Path, upstream: Hub) -> None:
    """The command creates no data directory."""
    assert "no data directory" in error_line(mirror(tmp_path, "status"), 1)
    assert not (tmp_path / "data").exists()


# refresh


def test_refresh(tmp_path: Path, upstream: Hub, images: dict[str, ImageTree]) -> None:
    """The upstream is asked although the tag is fresh, and its answer is served from then on."""
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
    fetches it at once. The command takes the image, or the reference in the error's text."""
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
    """Returns the response, or None when it was cut off."""
    with suppress(httpx2.TransportError):
        return client.get(path)
    return None


def test_refresh_of_a_tag_that_is_gone(tmp_path: Path, upstream: Hub, images: dict[str, ImageTree]) -> None:
    """The error is one line, and the cached tag is dropped."""
    done(tmp_path, "refresh", "app:1")
    upstream.remove("library/app", "1")
    said = error_line(mirror(tmp_path, "refresh", "app:1"), 1)
    assert said.startswith("app:1: it is gone: ")
    assert said.endswith(f"it was {images['index'].digest}")
    assert status(tmp_path)["upstreams"][0]["tags"] == 0


def test_refresh_when_the_upstream_is_off(tmp_path: Path, upstream: Hub) -> None:
    """The error is one line. The cached tag stays, and is as fresh as before."""
    done(tmp_path, "refresh", "app:1")
    upstream.refuse()
    assert "is served as it was" in error_line(mirror(tmp_path, "refresh", "app:1"), 1)
    (seen,) = status(tmp_path)["upstreams"]
    assert (seen["tags"], seen["stale"]) == (1, 0)


def digests_served(server: RegistryServer, path: str = "/v2/app/manifests/1") -> set[str]:
    """Returns the digests in the responses of all workers, over several connections."""
    found = set()
    for _ in range(16):
        answer = httpx2.head(f"{server.url}{path}")
        assert "warning" not in answer.headers
        found.add(answer.headers["docker-content-digest"])
    return found


def test_refresh_beside_a_server(tmp_path: Path, upstream: Hub, images: dict[str, ImageTree]) -> None:
    """All workers of a server on the same data directory serve what the refresh found, without asking the upstream. A
    tag that is gone is gone there too."""
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
        assert {httpx2.head(f"{server.url}/v2/app/manifests/1").status_code for _ in range(16)} == {404}
        assert upstream.count() == 0


# purge


def test_purge_a_tag(tmp_path: Path, upstream: Hub, images: dict[str, ImageTree]) -> None:
    """The cached copy is dropped. The output says how much is freed and when. The next pull fetches it again."""
    done(tmp_path, "warm", "app:1", *FOR_AMD64)
    (line,) = done(tmp_path, "purge", "app:1")
    assert line.startswith("app:1: dropped 1 tag and 2 manifests; 3.0 MiB are freed after ")
    assert line.endswith("(gc.grace is 24h), unless a pull uses them again before")
    assert status(tmp_path)["upstreams"][0]["manifests"] == 0
    upstream.forget()
    done(tmp_path, "refresh", "app:1")
    assert upstream.count("manifest", "GET") == 1


def test_purge_beside_a_server(tmp_path: Path, upstream: Hub, images: dict[str, ImageTree]) -> None:
    """A server on the same data directory no longer has the dropped tag and manifests, and fetches them at the next
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
    """With --all the whole repository is dropped. Other repositories stay."""
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
    """Names that are hosted here have no upstream. They cannot be warmed, refreshed or purged."""
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
    """A wrong reference, platform or file is one line with exit code 2, before the data directory is opened."""
    (tmp_path / "two.txt").write_text("# two\napp:1 app:2\n")
    assert said in error_line(entrepot("mirror", *args, "--mirror", "docker.io", folder=tmp_path), 2)
    assert not (tmp_path / "data").exists()


def test_nothing_is_mirrored(tmp_path: Path) -> None:
    """Without an upstream, each command says how to name one."""
    for command in (["warm", "app"], ["status"], ["refresh", "app"], ["purge", "app"]):
        said = error_line(entrepot("mirror", *command, folder=tmp_path), 2)
        assert said.startswith("nothing is mirrored: name an upstream with --mirror docker.io")
