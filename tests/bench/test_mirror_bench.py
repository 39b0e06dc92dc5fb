"""Tests of the bench `mirror`: it counts the upstream's traffic, starts programs, and detects wrong bytes."""

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


def log_line(method: str, path: str, status: int, body: int) -> str:
    return json.dumps({"method": method, "path": path, "status": status, "body": body})


@pytest.fixture
def pushed_image(server: RegistryServer, tmp_path: Path) -> PushedImage:
    """Pushes an image to the server."""
    return push_image(IMAGE, server.port, tmp_path)


def test_bytes_of_manifests_and_blobs_are_counted() -> None:
    """The sent bytes of manifests, whole blobs and ranges are added up. GETs and HEADs of manifests are counted."""
    log = [
        log_line("GET", f"/v2/{REPO}/manifests/latest", 200, 500),
        log_line("GET", f"/v2/{REPO}/manifests/sha256:ab", 200, 500),
        log_line("HEAD", f"/v2/{REPO}/manifests/latest", 200, 0),
        log_line("GET", f"/v2/{REPO}/blobs/sha256:cd", 200, 40),
        log_line("GET", f"/v2/{REPO}/blobs/sha256:ef", 206, 2),
    ]
    assert count_traffic(log, REPO) == UpstreamTraffic(content=1042, blobs=42, manifest_gets=2, manifest_heads=1)


def test_other_requests_are_not_counted() -> None:
    """Requests for `/v2/`, errors, lists of tags, and requests for other repositories, even with similar names, do not
    count."""
    log = [
        log_line("GET", "/v2/", 200, 2),
        log_line("GET", f"/v2/{REPO}/blobs/sha256:cd", 404, 90),
        log_line("GET", f"/v2/{REPO}/manifests/latest", 304, 0),
        log_line("GET", f"/v2/{REPO}/tags/list", 200, 70),
        log_line("GET", f"/v2/other/{REPO}/blobs/sha256:cd", 200, 40),
        log_line("GET", f"/v2/{REPO}/more/blobs/sha256:cd", 200, 40),
        log_line("GET", f"/v2/{REPO}/blobs/blobs/sha256:cd", 200, 40),
    ]
    assert count_traffic(log, REPO) == UpstreamTraffic()


def test_nginx_logs_what_was_sent(server: RegistryServer, pushed_image: PushedImage, tmp_path: Path) -> None:
    """Once nginx has ended, its log has all bytes that clients have received, including ranges, and all HEADs."""
    layer = json.loads(pushed_image.body)["layers"][1]
    with running_nginx(server.port, tmp_path / "gate") as proxy:
        pulled = pull_image(PullOrder(proxy.port, pushed_image.repo, TAG, clients=2))
        with HttpClient(proxy.port) as client:
            client.request(
                "GET", f"/v2/{pushed_image.repo}/blobs/{layer['digest']}", headers={"Range": "bytes=5-9"}, expect=206
            )
    assert pulled.size == 2 * pushed_image.size
    assert proxy.sent(pushed_image.repo) == UpstreamTraffic(
        2 * pushed_image.size + 5, 2 * (pushed_image.size - len(pushed_image.body)) + 5, 2, 2
    )


def test_nginx_gets_the_rate_limit(server: RegistryServer, pushed_image: PushedImage, tmp_path: Path) -> None:
    """The configuration of nginx has the rate limit, and clients get the whole image."""
    with running_nginx(server.port, tmp_path / "gate", limit="64m") as proxy:
        assert pull_image(PullOrder(proxy.port, pushed_image.repo, TAG)).size == pushed_image.size
    assert "limit_rate 64m;" in (tmp_path / "gate" / "nginx.conf").read_text()


def test_relay_forwards_every_byte(server: RegistryServer, pushed_image: PushedImage, tmp_path: Path) -> None:
    """Clients can pull and push images through the relay, and all bytes arrive."""
    with running_relay(server.port, tmp_path / "relay", rate=256 << 20) as port:
        pulled = pull_image(PullOrder(port, pushed_image.repo, TAG, clients=3))
        pushed = push_image(replace(IMAGE, repo="team/other"), port, tmp_path)
    assert pulled.size == 3 * pushed_image.size
    assert pull_image(PullOrder(server.port, pushed.repo, TAG)).size == pushed.size


def test_pull_measures_each_blob(server: RegistryServer, pushed_image: PushedImage) -> None:
    """The result of a pull has the config and all layers of each client. For each, the headers come before the first
    byte, and the first byte before the last."""
    pulled = pull_image(PullOrder(server.port, pushed_image.repo, TAG, clients=2, parallel=1))
    layer_sizes = sorted(blob.size for blob in pulled.blobs)[2:]  # without the two configs, which are the smallest
    assert layer_sizes == sorted([10_000, 200_000, 3_000_000] * 2)
    assert all(0 < blob.headers <= blob.first <= blob.whole <= pulled.seconds for blob in pulled.blobs)
    assert pulled.largest().size == pushed_image.largest == 3_000_000


@pytest.mark.parametrize("verified", [None, 1])
def test_pull_detects_wrong_bytes(server: RegistryServer, pushed_image: PushedImage, verified: int | None) -> None:
    """If a blob was changed on the server's disk, the pull raises TrialFailed, whether one client or all clients verify
    digests."""
    digest = json.loads(pushed_image.body)["layers"][1]["digest"]
    (file,) = (server.data / "blobs").rglob(digest.removeprefix("sha256:"))
    file.chmod(0o600)
    with file.open("r+b") as stored:
        stored.write(b"something else")
    with pytest.raises(TrialFailed, match=f"blob {digest} of 3000000 bytes came as 3000000 bytes"):
        pull_image(PullOrder(server.port, pushed_image.repo, TAG, clients=2, verified=verified))


def test_pull_of_a_missing_image_fails(server: RegistryServer) -> None:
    """A status other than 200 makes the pull raise TrialFailed."""
    with pytest.raises(TrialFailed, match="gave 404"):
        pull_image(PullOrder(server.port, "team/none", TAG))


def test_size_of_a_pushed_image(server: RegistryServer, pushed_image: PushedImage) -> None:
    """`size` is the sum of the sizes of the manifest, the config and the layers."""
    image = json.loads(pushed_image.body)
    parts = [image["config"], *image["layers"]]
    assert pushed_image.size == len(pushed_image.body) + sum(part["size"] for part in parts)


def test_entrepot_is_set_up_as_a_mirror(tmp_path: Path) -> None:
    """Entrepot's configuration has the upstream as its default upstream, and a prefix for pushed images."""
    command = ENTREPOT.command(tmp_path, 5000, "http://127.0.0.1:1234")
    settings = load_settings({}, Path(command[command.index("--config") + 1])).settings
    assert [(one.name, one.endpoints, one.default) for one in settings.upstream] == [
        ("docker.io", ["http://127.0.0.1:1234"], True)
    ]
    assert settings.hosted.prefixes == ["team/**"]


def test_another_checkout_is_set_up_as_a_mirror(tmp_path: Path) -> None:
    """The program for another checkout has the checkout's folder and a different name. A folder that is not a checkout
    raises BenchFailed."""
    other = tmp_path / "other"
    (other / "registry").mkdir(parents=True)
    with pytest.raises(BenchFailed, match="holds no checkout of Entrepot"):
        entrepot_checkout(other)
    (other / "registry" / "__main__.py").write_text("")
    program = entrepot_checkout(other)
    assert (program.root, program.is_entrepot) == (other, True)
    assert program.name != ENTREPOT.name


def test_docker_registry_is_set_up_as_a_mirror(tmp_path: Path) -> None:
    """docker-registry's configuration has the upstream in addition to its usual settings."""
    *_, path = DOCKER_REGISTRY.command(tmp_path, 5000, "http://127.0.0.1:1234")
    config = json.loads(Path(path).read_text())
    assert config["proxy"] == {"remoteurl": "http://127.0.0.1:1234"}
    assert config["http"]["addr"] == "127.0.0.1:5000"


def test_every_goal_names_a_measured_row_and_figure() -> None:
    """Every goal names an existing row and figure, so no goal is skipped because of a typing error."""
    measured = {(row.name, figure.key) for row in all_mirror_rows() for figure in row.figures}
    assert {(goal.row, goal.key) for goal in MIRROR_GOALS} <= measured
    assert len({row.name for row in all_mirror_rows()}) == len(all_mirror_rows())


def test_rows_are_chosen_by_name() -> None:
    """Chosen rows are in the order of measurement. An unknown name raises BenchFailed."""
    assert [row.name for row in pick_rows(all_mirror_rows(), "warm, thundering")] == ["thundering", "warm"]
    with pytest.raises(BenchFailed, match="no row is called cold; there are: thundering"):
        pick_rows(all_mirror_rows(), "cold")
