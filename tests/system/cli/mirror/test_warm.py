"""`entrepot mirror warm`, with an upstream over HTTP and with a running server."""

from __future__ import annotations

import os
import pty
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

from storage.composition import list_partials
from tests.fakes.client_images import MIB
from tests.fakes.commands import wait_for_output
from tests.fakes.hub.hub import Hub, repeated, union
from tests.fakes.plain_client import plain_client
from tests.fakes.server_process import RegistryServer, running_server
from tests.fakes.upstream_content import ImageTree, UpstreamContent, noise_image
from tests.system.cli.mirror.conftest import FOR_AMD64, blobs_asked_for, done, mirror, settings, started, status


def test_warm_brings_one_platform(tmp_path: Path, upstream: Hub, images: dict[str, ImageTree]) -> None:
    """The manifests, config and layers of the chosen platform are fetched, each byte once, and nothing of other
    platforms."""
    lines = done(tmp_path, "warm", "app:1", *FOR_AMD64)
    assert lines[0] == "app:1: 2 manifests, 3 blobs: 3.0 MiB fetched, 0 B already cached"
    assert lines[1].startswith("1 reference cached; 3.0 MiB fetched, 0 B already cached, ")
    assert blobs_asked_for(upstream) == set(images["amd64"].blobs)
    for digest, blob in images["amd64"].blobs.items():
        assert repeated(upstream.sent(digest)) == []
        assert union(upstream.sent(digest)) == [(0, blob.size)]
    assert upstream.count("manifest", "GET") == 2


def test_warm_again_fetches_nothing(tmp_path: Path, upstream: Hub) -> None:
    """Cached content is not fetched again."""
    done(tmp_path, "warm", "app:1", *FOR_AMD64)
    upstream.forget()
    assert done(tmp_path, "warm", "app:1", *FOR_AMD64)[0].endswith(" 0 B fetched, 3.0 MiB already cached")
    assert upstream.requests() == []


def test_warm_several_platforms(tmp_path: Path, upstream: Hub, images: dict[str, ImageTree]) -> None:
    """--platform can be repeated, and --all-platforms fetches all that the index lists."""
    done(tmp_path, "warm", "app:1", "--platform", "linux/arm64", *FOR_AMD64)
    assert blobs_asked_for(upstream) == set(images["index"].blobs)
    done(tmp_path, "purge", "--all", "app")
    assert done(tmp_path, "warm", "app:1", "--all-platforms")[0].startswith("app:1: 3 manifests, 6 blobs: ")


def test_warm_by_digest_and_other_names(tmp_path: Path, upstream: Hub, images: dict[str, ImageTree]) -> None:
    """References are written as for a pull: by digest, with the upstream's name, or with `library/`. The same image is
    fetched once."""
    digest = images["arm64"].digest
    lines = done(tmp_path, "warm", f"docker.io/library/app@{digest}", f"app@{digest}", "docker.io/team/tool:2")
    assert lines[-1].startswith("3 references cached; ")
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
    """If a server is fetching a blob for a client, the command waits for it and does not fetch it again."""
    layer = images["amd64"].layers[1]
    upstream.fault(on="blob", match=layer.digest, stall_after=MIB)
    with (
        running_server(tmp_path, "--config", str(tmp_path / "entrepot.toml")) as server,
        plain_client(server.url, timeout=60) as client,
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
    """For each image that failed there is one line with the reason, and the exit code is 1. All other images are
    fetched."""
    ended = mirror(tmp_path, "warm", "app:1", "app:none", "team/none:1", *FOR_AMD64)
    assert ended.returncode == 1
    assert sorted(line.partition(": ")[2].partition(": ")[0] for line in ended.stderr.splitlines()) == [
        "app:none", "team/none:1",
    ]  # fmt: skip
    assert ended.stdout.splitlines()[-1].startswith("1 reference cached, 2 failed; 3.0 MiB fetched")


def test_warm_says_which_platforms_there_are(tmp_path: Path, upstream: Hub) -> None:
    """For a platform that the index does not have, the error lists the platforms that it has. The other platforms are
    fetched."""
    ended = mirror(tmp_path, "warm", "app:1", "--platform", "linux/s390x", *FOR_AMD64)
    assert ended.returncode == 1
    assert "does not exist for linux/s390x, only for linux/amd64, linux/arm64" in ended.stderr
    assert "3.0 MiB fetched" in ended.stdout


def test_warm_from_a_file(tmp_path: Path, upstream: Hub) -> None:
    """The file has one reference a line. Comments and empty lines are ignored."""
    (tmp_path / "images.txt").write_text("# ours\n\napp:1   # the first\n  team/tool:2\napp:1\n")
    assert done(tmp_path, "warm", "--file", "images.txt", *FOR_AMD64)[-1].startswith("2 references cached; ")


def test_warm_what_the_settings_name(tmp_path: Path, upstream: Hub) -> None:
    """Without references the command uses `[warm]`, including its platforms."""
    more = '[warm]\nreferences = ["app:1"]\nplatforms = ["all"]\n'
    (tmp_path / "entrepot.toml").write_text(settings(upstream, more))
    assert done(tmp_path, "warm")[0].startswith("app:1: 3 manifests, 6 blobs: ")


def test_warm_when_the_upstream_is_off(tmp_path: Path, upstream: Hub) -> None:
    """If the upstream is down, the error is one line that names it. A cached copy that could not be checked is an error
    as well."""
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


def test_warm_after_wrong_bytes(tmp_path: Path, upstream: Hub, images: dict[str, ImageTree]) -> None:
    """A layer whose bytes are corrupt once is fetched again."""
    upstream.fault(on="blob", match=images["amd64"].layers[1].digest, corrupt=5)
    assert done(tmp_path, "warm", "app:1", *FOR_AMD64)[0].startswith("app:1: 2 manifests, 3 blobs: 3.0 MiB fetched")
    assert upstream.faults == 0


def test_bars_in_a_terminal(tmp_path: Path, upstream: Hub, images: dict[str, ImageTree]) -> None:
    """If stderr is a terminal, it shows a bar for each blob that is being fetched. stdout has the same lines as without
    a terminal."""
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
    """The server fetches the images in `[warm]`, and fetches them again when their tags have moved. One worker does
    this for all."""
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
    """Returns the worker that holds the lock for the schedule (proc(5), fdinfo). During a download, other workers may
    hold a lock on the same file."""
    found = []
    for pid in server.worker_pids():
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):
                told = (fd.parent.parent / "fdinfo" / fd.name).read_text()
                if fd.readlink() == server.data / "locks" / "turns" and "OFDLCK" in told:
                    found.append(pid)
    return found
