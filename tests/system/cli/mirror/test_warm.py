"""Tests of warming: fetching images from an upstream (here a fake one) into the cache of a mirror. The command
`entrepot mirror warm` does this once. A running server does this on a schedule."""

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
from tests.system.cli.mirror.conftest import (
    FOR_AMD64,
    output_of,
    requested_blobs,
    run_mirror,
    settings,
    start_mirror,
    status,
)


def test_warm_fetches_one_platform(tmp_path: Path, upstream: Hub, images: dict[str, ImageTree]) -> None:
    """The command fetches the manifests, the config and the layers of the chosen platform, each byte once. It fetches
    nothing of other platforms."""
    lines = output_of(tmp_path, "warm", "app:1", *FOR_AMD64)
    assert lines[0] == "app:1: 2 manifests, 3 blobs: 3.0 MiB fetched, 0 B already cached"
    assert lines[1].startswith("1 reference cached; 3.0 MiB fetched, 0 B already cached, ")
    assert requested_blobs(upstream) == set(images["amd64"].blobs)
    for digest, blob in images["amd64"].blobs.items():
        assert repeated(upstream.sent_ranges(digest)) == []
        assert union(upstream.sent_ranges(digest)) == [(0, blob.size)]
    assert upstream.count("manifest", "GET") == 2


def test_warm_again_fetches_nothing(tmp_path: Path, upstream: Hub) -> None:
    """The command does not fetch cached content again."""
    output_of(tmp_path, "warm", "app:1", *FOR_AMD64)
    upstream.forget()
    assert output_of(tmp_path, "warm", "app:1", *FOR_AMD64)[0].endswith(" 0 B fetched, 3.0 MiB already cached")
    assert upstream.requests() == []


def test_warm_several_platforms(tmp_path: Path, upstream: Hub, images: dict[str, ImageTree]) -> None:
    """--platform can be given several times, and --all-platforms fetches all platforms of the index."""
    output_of(tmp_path, "warm", "app:1", "--platform", "linux/arm64", *FOR_AMD64)
    assert requested_blobs(upstream) == set(images["index"].blobs)
    output_of(tmp_path, "purge", "--all", "app")
    assert output_of(tmp_path, "warm", "app:1", "--all-platforms")[0].startswith("app:1: 3 manifests, 6 blobs: ")


def test_warm_by_digest_and_other_names(tmp_path: Path, upstream: Hub, images: dict[str, ImageTree]) -> None:
    """The command accepts the references that clients use for pulls: by digest, with the upstream's name, or with
    `library/`. It fetches an image once, even if several references name it."""
    digest = images["arm64"].digest
    lines = output_of(tmp_path, "warm", f"docker.io/library/app@{digest}", f"app@{digest}", "docker.io/team/tool:2")
    assert lines[-1].startswith("3 references cached; ")
    assert requested_blobs(upstream) >= set(images["arm64"].blobs)
    assert all(repeated(upstream.sent_ranges(digest)) == [] for digest in images["arm64"].blobs)


def test_warmed_images_are_served_without_upstream(tmp_path: Path, upstream: Hub, images: dict[str, ImageTree]) -> None:
    """A server on the same data directory serves the fetched images, even if the upstream is down."""
    with running_server(tmp_path, "--config", str(tmp_path / "entrepot.toml")) as server:
        output_of(tmp_path, "warm", "app:1", *FOR_AMD64)
        upstream.refuse()
        with plain_client(server.url) as client:
            assert client.get("/v2/app/manifests/1").content == images["index"].body
            assert client.get(f"/v2/app/manifests/{images['amd64'].digest}").content == images["amd64"].body
            for digest, blob in images["amd64"].blobs.items():
                assert client.get(f"/v2/app/blobs/{digest}").content == blob.read()


def test_warm_while_a_server_fetches_the_same_blob(tmp_path: Path, upstream: Hub, images: dict[str, ImageTree]) -> None:
    """If a server is already fetching a blob for a client, the command waits for this download and does not fetch the
    blob itself."""
    layer = images["amd64"].layers[1]
    upstream.fault(on="blob", match=layer.digest, stall_after=MIB)
    with (
        running_server(tmp_path, "--config", str(tmp_path / "entrepot.toml")) as server,
        plain_client(server.url, timeout=60) as client,
        ThreadPoolExecutor() as threads,
    ):
        client.get(f"/v2/app/manifests/{images['amd64'].digest}").raise_for_status()
        pull = threads.submit(client.get, f"/v2/app/blobs/{layer.digest}")
        upstream.wait(1, "blob", digest=layer.digest)
        with start_mirror(tmp_path, "warm", "app:1", *FOR_AMD64) as running:
            upstream.wait(1, "manifest", match="manifests/1")
            upstream.release()
            out, err = wait_for_output(running)
        assert pull.result().content == layer.read()
    assert (running.returncode, err) == (0, "")
    assert out.startswith("app:1: 2 manifests, 3 blobs: ")
    assert repeated(upstream.sent_ranges(layer.digest)) == []


def test_warm_reports_failed_images(tmp_path: Path, upstream: Hub, images: dict[str, ImageTree]) -> None:
    """For each image that cannot be fetched, there is one line with the reason, and the exit code is 1. All other
    images are fetched."""
    result = run_mirror(tmp_path, "warm", "app:1", "app:none", "team/none:1", *FOR_AMD64)
    assert result.returncode == 1
    assert sorted(line.partition(": ")[2].partition(": ")[0] for line in result.stderr.splitlines()) == [
        "app:none", "team/none:1",
    ]  # fmt: skip
    assert result.stdout.splitlines()[-1].startswith("1 reference cached, 2 failed; 3.0 MiB fetched")


def test_warm_lists_the_platforms_of_the_index(tmp_path: Path, upstream: Hub) -> None:
    """If the index does not have a requested platform, the error lists the platforms of the index. The other requested
    platforms are fetched."""
    result = run_mirror(tmp_path, "warm", "app:1", "--platform", "linux/s390x", *FOR_AMD64)
    assert result.returncode == 1
    assert "does not exist for linux/s390x, only for linux/amd64, linux/arm64" in result.stderr
    assert "3.0 MiB fetched" in result.stdout


def test_warm_from_a_file(tmp_path: Path, upstream: Hub) -> None:
    """--file names a file with one reference per line. Comments and empty lines are ignored."""
    (tmp_path / "images.txt").write_text("# ours\n\napp:1   # the first\n  team/tool:2\napp:1\n")
    assert output_of(tmp_path, "warm", "--file", "images.txt", *FOR_AMD64)[-1].startswith("2 references cached; ")


def test_warm_from_the_settings(tmp_path: Path, upstream: Hub) -> None:
    """Without references, the command fetches the references and platforms of the table `[warm]` in the settings."""
    more = '[warm]\nreferences = ["app:1"]\nplatforms = ["all"]\n'
    (tmp_path / "entrepot.toml").write_text(settings(upstream, more))
    assert output_of(tmp_path, "warm")[0].startswith("app:1: 3 manifests, 6 blobs: ")


def test_warm_when_the_upstream_is_off(tmp_path: Path, upstream: Hub) -> None:
    """If the upstream is down, the command fails with an error of one line. The command also fails if the tag is cached
    but is stale and cannot be checked at the upstream."""
    upstream.refuse()
    result = run_mirror(tmp_path, "warm", "app:1")
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    upstream.listen()
    (tmp_path / "entrepot.toml").write_text(settings(upstream).replace('"1h"', '"0s"'))
    output_of(tmp_path, "warm", "app:1", *FOR_AMD64)
    upstream.refuse()
    result = run_mirror(tmp_path, "warm", "app:1", *FOR_AMD64)
    assert result.returncode == 1
    assert "is served as it was" in result.stderr


def test_next_run_continues_an_interrupted_warm(tmp_path: Path, upstream: Hub, images: dict[str, ImageTree]) -> None:
    """Ctrl-C ends the command with one line. The next run fetches only the rest of the layer."""
    layer = images["amd64"].layers[1]
    upstream.fault(on="blob", match=layer.digest, stall_after=MIB, times=100)
    with start_mirror(tmp_path, "warm", "app:1", *FOR_AMD64) as running:
        upstream.wait(1, "blob", digest=layer.digest)
        upstream.until(lambda: any(fill.received >= MIB for fill in list_partials(tmp_path / "data")))
        running.send_signal(signal.SIGINT)
        out, err = wait_for_output(running)
    assert (running.returncode, out) == (130, "")
    assert err.startswith("entrepot: interrupted; what was fetched stays cached")
    upstream.clear()
    upstream.release()
    # `fills`: the unfinished downloads. The download of a small blob may have been interrupted as well.
    fills = {fill["digest"]: fill for fill in status(tmp_path)["fills"]}
    assert (fills[layer.digest]["size"], fills[layer.digest]["running"]) == (layer.size, False)
    assert layer.digest in "\n".join(output_of(tmp_path, "status"))
    output_of(tmp_path, "warm", "app:1", *FOR_AMD64)
    assert status(tmp_path)["fills"] == []
    assert union(upstream.sent_ranges(layer.digest)) == [(0, layer.size)]


def test_warm_fetches_corrupt_bytes_again(tmp_path: Path, upstream: Hub, images: dict[str, ImageTree]) -> None:
    """If the upstream sends a layer with corrupt bytes once, the command fetches the layer again and succeeds."""
    upstream.fault(on="blob", match=images["amd64"].layers[1].digest, corrupt=5)
    assert output_of(tmp_path, "warm", "app:1", *FOR_AMD64)[0].startswith(
        "app:1: 2 manifests, 3 blobs: 3.0 MiB fetched"
    )
    assert upstream.faults == 0


def test_progress_bars_in_a_terminal(tmp_path: Path, upstream: Hub, images: dict[str, ImageTree]) -> None:
    """If stderr is a terminal, the command shows a progress bar for each blob that is being fetched. stdout has the
    same lines as without a terminal."""
    layer = images["amd64"].layers[1]
    upstream.fault(on="blob", match=layer.digest, stall_after=MIB, times=100)
    reader_end, command_end = pty.openpty()
    terminal_output = b""
    with start_mirror(tmp_path, "warm", "app:1", *FOR_AMD64, stderr=command_end) as running:
        os.close(command_end)
        while layer.digest[:19].encode() not in terminal_output:
            terminal_output += os.read(reader_end, 65536)
        upstream.clear()
        upstream.release()
        with suppress(OSError):  # EIO means that the command has closed its end of the terminal
            while piece := os.read(reader_end, 65536):
                terminal_output += piece
        out, _ = wait_for_output(running)
    os.close(reader_end)
    assert running.returncode == 0
    assert out.splitlines()[0].startswith("app:1: 2 manifests, 3 blobs: 3.0 MiB fetched")
    assert b"\x1b[" in terminal_output


def test_server_warms_by_schedule(tmp_path: Path, upstream: Hub, images: dict[str, ImageTree]) -> None:
    """The server fetches the images of the table `[warm]` at each interval, and fetches the new image after a tag has
    moved at the upstream. Only one worker does this work, so no byte is fetched twice."""
    more = '[warm]\nreferences = ["app:1"]\nplatforms = ["linux/amd64"]\ninterval = "1s"\n'
    (tmp_path / "entrepot.toml").write_text(settings(upstream, more).replace('"1h"', '"0s"'))
    later = noise_image("later", 700)
    with running_server(tmp_path, "--config", str(tmp_path / "entrepot.toml")):
        upstream.until(lambda: requested_blobs(upstream) == set(images["amd64"].blobs))
        content = UpstreamContent()
        content.add("library/app", later, "1")
        upstream.put(content)
        upstream.until(lambda: requested_blobs(upstream) >= set(later.blobs))
    assert all(repeated(upstream.sent_ranges(digest)) == [] for digest in {**images["amd64"].blobs, **later.blobs})


def test_schedule_continues_after_a_worker_is_killed(tmp_path: Path, upstream: Hub) -> None:
    """After the worker that fetches the images of the schedule is killed, another worker continues the schedule."""
    more = '[warm]\nreferences = ["app:1"]\nplatforms = ["linux/amd64"]\ninterval = "1s"\n'
    (tmp_path / "entrepot.toml").write_text(settings(upstream, more).replace('"1h"', '"0s"'))
    with running_server(tmp_path, "--config", str(tmp_path / "entrepot.toml")) as server:
        for number in range(3):
            later = noise_image(f"later {number}", 700)
            content = UpstreamContent()
            content.add("library/app", later, "1")
            upstream.put(content)
            upstream.until(partial(was_requested, upstream, later))
            upstream.until(lambda: bool(warming_workers(server)))
            os.kill(warming_workers(server)[0], signal.SIGKILL)


def was_requested(upstream: Hub, image: ImageTree) -> bool:
    """Returns whether all blobs of the image were requested from the upstream."""
    return requested_blobs(upstream) >= set(image.blobs)


def warming_workers(server: RegistryServer) -> list[int]:
    """Returns the process ids of the workers that hold a lock on the file `locks/turns` (see fdinfo in proc(5)). The
    worker that runs the schedule holds such a lock. During a download, other workers may hold such a lock as well."""
    found = []
    for pid in server.worker_pids():
        fds: list[Path] = []
        with suppress(FileNotFoundError):  # the worker may have ended since
            fds = list(Path(f"/proc/{pid}/fd").iterdir())
        for fd in fds:
            with suppress(FileNotFoundError):
                lock_info = (fd.parent.parent / "fdinfo" / fd.name).read_text()
                if fd.readlink() == server.data / "locks" / "turns" and "OFDLCK" in lock_info:
                    found.append(pid)
    return found
