"""Tests of the mirror bench: counting traffic, starting programs, and clients that detect wrong bytes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench.errors import BenchFailed, TrialFailed
from bench.loaders.http_client import HttpClient
from bench.loaders.image_pull import PullOrder, pull_image
from bench.mirror.mirror_images import TAG, ImageSpec, PushedImage, push_image
from bench.mirror.mirror_run import all_mirror_rows
from bench.mirror.nginx_proxy import UpstreamTraffic, count_traffic, running_nginx
from bench.mirror.paced_relay import running_relay
from bench.report.goals import MIRROR_GOALS
from bench.runner import pick_rows
from bench.system.servers import DOCKER_REGISTRY, ENTREPOT, entrepot_checkout
from registry.config.settings_sources import load_settings
from tests.fakes.server_process import RegistryServer

IMAGE = ImageSpec("team/bench", [200_000, 3_000_000, 10_000])
REPO = "library/app"


def line(method: str, path: str, status: int, body: int) -> str:
    return json.dumps({"method": method, "path": path, "status": status, "body": body})


@pytest.fixture
def held(server: RegistryServer, tmp_path: Path) -> PushedImage:
    """Pushes an image to a server."""
    return push_image(IMAGE, server.port, tmp_path)


def test_bytes_of_manifests_and_blobs_are_counted() -> None:
    """Whole blobs, ranges and interrupted requests count with the bytes that were sent. So do manifests, whose GETs and
    HEADs are counted separately."""
    log = [
        line("GET", f"/v2/{REPO}/manifests/latest", 200, 500),
        line("GET", f"/v2/{REPO}/manifests/sha256:ab", 200, 500),
        line("HEAD", f"/v2/{REPO}/manifests/latest", 200, 0),
        line("GET", f"/v2/{REPO}/blobs/sha256:cd", 200, 40),
        line("GET", f"/v2/{REPO}/blobs/sha256:ef", 206, 2),
    ]
    assert count_traffic(log, REPO) == UpstreamTraffic(content=1042, blobs=42, manifest_gets=2, manifest_heads=1)


def test_what_is_not_the_image_is_not_counted() -> None:
    """Pings, errors, tags lists and other repositories do not count, not even those with a similar name."""
    log = [
        line("GET", "/v2/", 200, 2),
        line("GET", f"/v2/{REPO}/blobs/sha256:cd", 404, 90),
        line("GET", f"/v2/{REPO}/manifests/latest", 304, 0),
        line("GET", f"/v2/{REPO}/tags/list", 200, 70),
        line("GET", f"/v2/other/{REPO}/blobs/sha256:cd", 200, 40),
        line("GET", f"/v2/{REPO}/more/blobs/sha256:cd", 200, 40),
        line("GET", f"/v2/{REPO}/blobs/blobs/sha256:cd", 200, 40),
    ]
    assert count_traffic(log, REPO) == UpstreamTraffic()


def test_nginx_logs_what_was_sent(server: RegistryServer, held: PushedImage, tmp_path: Path) -> None:
    """The log of nginx has all bytes that clients received, ranges and HEADs included, once nginx has ended."""
    layer = json.loads(held.body)["layers"][1]
    with running_nginx(server.port, tmp_path / "gate") as before:
        pulled = pull_image(PullOrder(before.port, held.repo, TAG, clients=2))
        with HttpClient(before.port) as client:
            client.request(
                "GET", f"/v2/{held.repo}/blobs/{layer['digest']}", headers={"Range": "bytes=5-9"}, expect=206
            )
    assert pulled.size == 2 * held.size
    assert before.sent(held.repo) == UpstreamTraffic(2 * held.size + 5, 2 * (held.size - len(held.body)) + 5, 2, 2)


def test_nginx_limits_a_request(server: RegistryServer, held: PushedImage, tmp_path: Path) -> None:
    """The configuration of nginx has the limit."""
    with running_nginx(server.port, tmp_path / "gate", limit="64m") as before:
        assert pull_image(PullOrder(before.port, held.repo, TAG)).size == held.size
    assert "limit_rate 64m;" in (tmp_path / "gate" / "nginx.conf").read_text()


def test_relay_forwards_every_byte(server: RegistryServer, held: PushedImage, tmp_path: Path) -> None:
    """Several clients receive and send all bytes through paced connections."""
    with running_relay(server.port, tmp_path / "relay", rate=256 << 20) as port:
        pulled = pull_image(PullOrder(port, held.repo, TAG, clients=3))
        pushed = push_image(replace(IMAGE, repo="team/other"), port, tmp_path)
    assert pulled.size == 3 * held.size
    assert pull_image(PullOrder(server.port, pushed.repo, TAG)).size == pushed.size


def test_pull_sees_each_blob(server: RegistryServer, held: PushedImage) -> None:
    """The result has config and layers, with ordered times: headers, first byte, whole."""
    pulled = pull_image(PullOrder(server.port, held.repo, TAG, clients=2, parallel=1))
    assert sorted(one.size for one in pulled.blobs)[2:] == sorted([10_000, 200_000, 3_000_000] * 2)
    assert all(0 < one.headers <= one.first <= one.whole <= pulled.seconds for one in pulled.blobs)
    assert pulled.largest().size == held.largest == 3_000_000


@pytest.mark.parametrize("verified", [None, 1])
def test_pull_takes_no_wrong_byte(server: RegistryServer, held: PushedImage, verified: int | None) -> None:
    """A blob that was changed on the server's disk fails the pull, whether one client verifies it or all."""
    digest = json.loads(held.body)["layers"][1]["digest"]
    (file,) = (server.data / "blobs").rglob(digest.removeprefix("sha256:"))
    file.chmod(0o600)
    with file.open("r+b") as stored:
        stored.write(b"something else")
    with pytest.raises(TrialFailed, match=f"blob {digest} of 3000000 bytes came as 3000000 bytes"):
        pull_image(PullOrder(server.port, held.repo, TAG, clients=2, verified=verified))


def test_pull_of_nothing_fails(server: RegistryServer) -> None:
    """A status other than 200 fails the pull."""
    with pytest.raises(TrialFailed, match="gave 404"):
        pull_image(PullOrder(server.port, "team/none", TAG))


def test_pushed_image_is_as_large_as_it_says(server: RegistryServer, held: PushedImage) -> None:
    """`size` is the sum of manifest, config and layers, to which the upstream's bytes are compared."""
    image = json.loads(held.body)
    parts = [image["config"], *image["layers"]]
    assert held.size == len(held.body) + sum(part["size"] for part in parts)


def test_entrepot_is_set_up_as_a_mirror(tmp_path: Path) -> None:
    """The configuration has the upstream as the default, and a prefix for pushed images."""
    command = ENTREPOT.command(tmp_path, 5000, "http://127.0.0.1:1234")
    settings = load_settings({}, Path(command[command.index("--config") + 1])).settings
    assert [(one.name, one.endpoints, one.default) for one in settings.upstream] == [
        ("docker.io", ["http://127.0.0.1:1234"], True)
    ]
    assert settings.hosted.prefixes == ["team/**"]


def test_another_checkout_is_set_up_as_a_mirror(tmp_path: Path) -> None:
    """The program runs that checkout's code and has its own name. A folder without a checkout is an error."""
    other = tmp_path / "other"
    (other / "registry").mkdir(parents=True)
    with pytest.raises(BenchFailed, match="holds no checkout of Entrepot"):
        entrepot_checkout(other)
    (other / "registry" / "__main__.py").write_text("")
    program = entrepot_checkout(other)
    assert (program.root, program.is_entrepot) == (other, True)
    assert program.name != ENTREPOT.name


def test_docker_registry_is_set_up_as_a_mirror(tmp_path: Path) -> None:
    """Its configuration has the upstream in addition to its usual settings."""
    *_, path = DOCKER_REGISTRY.command(tmp_path, 5000, "http://127.0.0.1:1234")
    config = json.loads(Path(path).read_text())
    assert config["proxy"] == {"remoteurl": "http://127.0.0.1:1234"}
    assert config["http"]["addr"] == "127.0.0.1:5000"


def test_goals_name_rows_and_figures_that_are_measured() -> None:
    """Every goal names an existing row and figure, so none is skipped because of a typing error."""
    measured = {(row.name, figure.key) for row in all_mirror_rows() for figure in row.figures}
    assert {(goal.row, goal.key) for goal in MIRROR_GOALS} <= measured
    assert len({row.name for row in all_mirror_rows()}) == len(all_mirror_rows())


def test_rows_are_chosen_by_name() -> None:
    """The rows come in the order in which they are measured. An unknown name is an error."""
    assert [row.name for row in pick_rows(all_mirror_rows(), "warm, thundering")] == ["thundering", "warm"]
    with pytest.raises(BenchFailed, match="no row is called cold; there are: thundering"):
        pick_rows(all_mirror_rows(), "cold")
