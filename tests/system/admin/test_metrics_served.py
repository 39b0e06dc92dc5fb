"""Tests of `/metrics` of a running server: which clients may read the metrics, and whether the counts are exact."""

from __future__ import annotations

import hashlib
import http.client
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2

from tests.fakes.admin_site import ADMIN, PASSWORD, AdminSite
from tests.fakes.metrics_reader import Scrape, parse, scrape
from tests.fakes.plain_client import plain_request
from tests.fakes.server_process import RegistryServer, running_server

ALLOW_LOOPBACK = '[metrics]\nallow = ["127.0.0.0/8"]\n'
CONNECTIONS, ROUNDS = 12, 60
"""The number of parallel connections of the load, and of rounds of four requests on each connection."""
ResponseCounts = Counter[tuple[str, str, str]]
"""The number of responses by route, method and status."""


def with_settings(folder: Path, text: str) -> str:
    """Writes a file with these settings. Returns its path."""
    (folder / "a.toml").write_text(text)
    return str(folder / "a.toml")


class Load:
    """Sends requests over several connections at the same time. `answered`: the number of complete responses. `lost`:
    the number of requests without a response. `half_done`: set after half of the requests."""

    def __init__(self, server: RegistryServer) -> None:
        self._port = server.port
        self._lock = threading.Lock()
        self.answered: ResponseCounts = Counter()
        self.lost = 0
        self.half_done = threading.Event()

    def run(self) -> None:
        with ThreadPoolExecutor(CONNECTIONS) as threads:
            for sender in [threads.submit(self._ask, number) for number in range(CONNECTIONS)]:
                sender.result()

    def _ask(self, number: int) -> None:
        """Sends the requests of one connection. If the connection breaks, opens a new one and sends the request
        again."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        for round_number in range(ROUNDS):
            body = f"{number} {round_number}".encode()
            digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
            for route, method, path, sent in (
                ("ping", "GET", "/v2/", None),
                ("uploads", "POST", f"/v2/team/app/blobs/uploads/?digest={digest}", body),
                ("blobs", "GET", f"/v2/team/app/blobs/{digest}", None),
                ("manifests", "HEAD", "/v2/team/app/manifests/none", None),
            ):
                while True:
                    try:
                        connection.request(method, path, sent)
                        answer = connection.getresponse()
                        answer.read()
                    except (OSError, http.client.HTTPException):
                        connection.close()
                        with self._lock:
                            self.lost += 1
                        continue
                    break
                with self._lock:
                    self.answered[route, method, str(answer.status)] += 1
                    if self.answered.total() >= CONNECTIONS * ROUNDS * 2:
                        self.half_done.set()
        connection.close()


def request_counts(metrics: Scrape) -> ResponseCounts:
    """Returns the counts in the metrics, except those of requests for the metrics."""
    return Counter(
        {
            (labels["route"], labels["method"], labels["status"]): int(value)
            for labels, value in metrics.values("entrepot_http_requests_total")
            if labels["route"] != "metrics"
        }
    )


def scrape_until(url: str, is_true: Callable[[Scrape], bool]) -> Scrape:
    """Reads the metrics until `is_true` returns True for them, at most for a minute, and returns them. The test has to
    wait because the server notices the end of a connection a little later than its client."""
    deadline = time.monotonic() + 60
    while not is_true(metrics := scrape(url)) and time.monotonic() < deadline:
        pass
    return metrics


def test_metrics_include_both_workers(tmp_path: Path) -> None:
    """Whichever worker sends the metrics, the counts include the requests of both workers, and are equal to the number
    of responses."""
    with running_server(tmp_path, "--config", with_settings(tmp_path, ALLOW_LOOPBACK)) as server:
        load = Load(server)
        load.run()
        assert load.lost == 0
        for _ in range(4):  # often enough to get the metrics from both workers
            metrics = scrape_until(server.url, lambda metrics: metrics.total("entrepot_open_connections") == 1)
            assert request_counts(metrics) == load.answered
        assert metrics.total("entrepot_http_request_duration_seconds_count") >= load.answered.total()
        pushed = CONNECTIONS * ROUNDS
        assert metrics.total("entrepot_database_changes_total") >= pushed
        assert (metrics.total("entrepot_workers"), metrics.total("entrepot_worker_starts_total")) == (2, 2)
        assert metrics.total("entrepot_worker_resident_memory_bytes") > 20_000_000
        assert metrics.total("entrepot_open_connections") == 1


def test_killed_worker_loses_no_counts(tmp_path: Path) -> None:
    """One of two workers is killed with SIGKILL while clients send requests. The metrics count all complete responses
    exactly. A request that was interrupted by the kill may or may not be counted."""
    with running_server(tmp_path, "--config", with_settings(tmp_path, ALLOW_LOOPBACK)) as server:
        load = Load(server)
        load_thread = threading.Thread(target=load.run)
        load_thread.start()
        assert load.half_done.wait(60)
        os.kill(server.worker_pids()[0], signal.SIGKILL)
        load_thread.join(120)
        assert not load_thread.is_alive()
        metrics = scrape_until(
            server.url,
            lambda metrics: (metrics.total("entrepot_workers"), metrics.total("entrepot_open_connections")) == (2, 1),
        )
        assert load.lost <= CONNECTIONS  # at most one request on each connection
        assert not load.answered - request_counts(metrics), "a response was not counted"
        assert request_counts(metrics).total() <= load.answered.total() + load.lost
        assert metrics.total("entrepot_worker_starts_total") == 3
        assert metrics.total("entrepot_open_connections") == 1, "connections of the killed worker are still counted"
        counts_before, load = request_counts(metrics), Load(server)
        load.run()
        assert request_counts(scrape(server.url)) - counts_before == load.answered


def test_who_may_read_the_metrics(site: AdminSite) -> None:
    """Admins may read the metrics. Other accounts and clients without a login may not, unless the settings allow their
    address."""
    client = httpx2.Client(base_url=site.server.url, trust_env=False)
    with client:
        assert client.get("/metrics").status_code == 401
        assert client.get("/metrics", auth=site.user()).status_code == 403
        answer = client.get("/metrics", auth=(ADMIN, PASSWORD))
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    assert "entrepot_http_requests_total{" in answer.text


def test_a_registry_without_accounts_shows_its_metrics(tmp_path: Path) -> None:
    """Without accounts, every client may read the metrics."""
    with running_server(tmp_path, workers=1) as server:
        assert scrape(server.url).total("entrepot_workers") == 1


def test_separate_port_for_metrics(tmp_path: Path) -> None:
    """If the settings have a separate port for metrics, every client that can connect to it may read the metrics. The
    port serves nothing else."""
    with socket.socket() as reserved_port:
        # This socket reserves a free port without listening on it, so that no other process takes the port.
        reserved_port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved_port.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{reserved_port.getsockname()[1]}"
        config = with_settings(tmp_path, f'[metrics]\nlisten = "{address}"\n')
        with running_server(tmp_path, "--config", config) as server:
            assert plain_request("GET", server.url + "/v2/").status_code == 200
            assert scrape(f"http://{address}").total("entrepot_http_requests_total", route="ping") == 1
            for path in ("/v2/", "/", "/health/live", "/api/v1/me"):
                assert plain_request("GET", f"http://{address}{path}").status_code == 404


def test_metrics_with_the_names_of_distribution(tmp_path: Path) -> None:
    """With the setting `distribution_names`, the metrics are also served with the names and labels of Distribution
    (registry:2)."""
    settings = ALLOW_LOOPBACK + "distribution_names = true\n"
    with running_server(tmp_path, "--config", with_settings(tmp_path, settings)) as server:
        with httpx2.Client(base_url=server.url, trust_env=False) as client:
            for _ in range(3):
                assert client.get("/v2/").status_code == 200
            assert client.get("/v2/team/app/manifests/1").status_code == 404
            body = b"x"
            digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
            assert client.post(f"/v2/team/app/blobs/uploads/?digest={digest}", content=body).status_code == 201
        metrics = scrape(server.url)
    for handler, method, code, count in (
        ("base", "get", "200", 3),
        ("manifest", "get", "404", 1),
        ("blob_upload", "post", "201", 1),
    ):
        assert metrics.total("registry_http_requests_total", handler=handler, method=method, code=code) == count
        assert metrics.total("registry_http_request_duration_seconds_count", handler=handler, method=method) == count
    assert metrics.total("registry_storage_action_seconds_count", driver="filesystem", action="GetContent") == 1
    assert [value for _, value in metrics.values("registry_proxy_hits_total", type="blob")] == [0]


def test_no_label_has_the_name_of_a_repository(tmp_path: Path) -> None:
    """No label of a metric has the name of a repository, whatever clients request."""
    with running_server(tmp_path, "--config", with_settings(tmp_path, ALLOW_LOOPBACK), workers=1) as server:
        with httpx2.Client(base_url=server.url, trust_env=False) as client:
            for path in ("/v2/secretname/app/manifests/1", "/v2/secretname/tags/list", "/secretname", "/v2/%zz"):
                client.get(path)
            client.request("SECRETNAME", "/v2/")
        answer = plain_request("GET", server.url + "/metrics")
    assert "secretname" not in answer.text.lower()


def test_metrics_of_the_store(tmp_path: Path) -> None:
    """The metrics have the sizes of the stored content, the use of quotas, and the space of the disk."""
    settings = ALLOW_LOOPBACK + '[[quota]]\nprefix = "team/"\nmax_size = "1GiB"\nmax_tags = 5\n'
    with running_server(tmp_path, "--config", with_settings(tmp_path, settings), workers=1) as server:
        with httpx2.Client(base_url=server.url, trust_env=False) as client:
            body = b"four"
            digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
            assert client.post(f"/v2/team/app/blobs/uploads/?digest={digest}", content=body).status_code == 201
            assert client.post("/v2/team/app/blobs/uploads/").status_code == 202
        metrics = scrape(server.url)
    assert metrics.total("entrepot_store_readable") == 1
    assert metrics.total("entrepot_blobs") == 1
    assert metrics.total("entrepot_blob_bytes") == 4
    assert metrics.total("entrepot_open_uploads") == 1
    assert metrics.total("entrepot_quota_limit_bytes", prefix="team/") == 1 << 30
    assert metrics.total("entrepot_quota_limit_tags", prefix="team/") == 5
    assert metrics.total("entrepot_disk_free_bytes") > 0
    assert metrics.total("entrepot_database_size_bytes") > 0


def test_logins_and_denials_are_counted(site: AdminSite) -> None:
    """The metrics count logins by method and outcome, and refused requests by the refused action."""
    user, password = site.user()
    with httpx2.Client(base_url=site.server.url, trust_env=False) as client:
        metrics_before = parse(client.get("/metrics", auth=(ADMIN, PASSWORD)).text)
        assert client.get("/v2/", auth=(user, "wrong-password-1")).status_code == 401
        assert client.post("/v2/nobody/may/blobs/uploads/", auth=(user, password)).status_code in (401, 403, 404)
        metrics_after = parse(client.get("/metrics", auth=(ADMIN, PASSWORD)).text)

    def growth(name: str, **labels: str) -> float:
        return metrics_after.total(name, **labels) - metrics_before.total(name, **labels)

    assert growth("entrepot_logins_total", method="password", outcome="failed") == 1
    assert growth("entrepot_logins_total", method="password", outcome="ok") >= 1
    assert growth("entrepot_denials_total", action="push") == 1
