"""`/metrics` of a real server: who may read it, and whether its counts are exact."""

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

ALLOWED = '[metrics]\nallow = ["127.0.0.0/8"]\n'
CONNECTIONS, ROUNDS = 12, 60
Answered = Counter[tuple[str, str, str]]
"""How many answers came, by route, method and status."""


def with_settings(folder: Path, text: str) -> str:
    (folder / "a.toml").write_text(text)
    return str(folder / "a.toml")


class Load:
    """Requests over several connections at the same time. `answered`: the complete responses. `lost`: requests without
    a response."""

    def __init__(self, server: RegistryServer) -> None:
        self._port = server.port
        self._lock = threading.Lock()
        self.answered: Answered = Counter()
        self.lost = 0
        self.half_done = threading.Event()

    def run(self) -> None:
        with ThreadPoolExecutor(CONNECTIONS) as threads:
            for done in [threads.submit(self._ask, number) for number in range(CONNECTIONS)]:
                done.result()

    def _ask(self, number: int) -> None:
        """Sends each request until it has a response, over one connection as long as that is open."""
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


def counted(found: Scrape) -> Answered:
    """Returns the counts in the metrics, without those of the scrapes themselves."""
    return Counter(
        {
            (labels["route"], labels["method"], labels["status"]): int(value)
            for labels, value in found.values("entrepot_http_requests_total")
            if labels["route"] != "metrics"
        }
    )


def scrape_until(url: str, is_true: Callable[[Scrape], bool]) -> Scrape:
    """Returns the first scrape for which `is_true` returns True, or the last one after a minute. The server notices the
    end of a connection a little later than its client."""
    deadline = time.monotonic() + 60
    while not is_true(found := scrape(url)) and time.monotonic() < deadline:
        pass
    return found


def test_two_workers_count_together(tmp_path: Path) -> None:
    """Whichever worker answers a scrape, the counts are those of both, and equal the number of responses."""
    with running_server(tmp_path, "--config", with_settings(tmp_path, ALLOWED)) as server:
        load = Load(server)
        load.run()
        assert load.lost == 0
        for _ in range(4):  # from either worker
            found = scrape_until(server.url, lambda found: found.total("entrepot_open_connections") == 1)
            assert counted(found) == load.answered
        assert found.total("entrepot_http_request_duration_seconds_count") >= load.answered.total()
        pushed = CONNECTIONS * ROUNDS
        assert found.total("entrepot_database_changes_total") >= pushed
        assert (found.total("entrepot_workers"), found.total("entrepot_worker_starts_total")) == (2, 2)
        assert found.total("entrepot_worker_resident_memory_bytes") > 20_000_000
        assert found.total("entrepot_open_connections") == 1


def test_a_killed_worker_loses_no_count(tmp_path: Path) -> None:
    """While requests run, one of two workers is killed by SIGKILL. All responses are counted exactly. Only a request
    that the kill has cut off may or may not be counted."""
    with running_server(tmp_path, "--config", with_settings(tmp_path, ALLOWED)) as server:
        load = Load(server)
        working = threading.Thread(target=load.run)
        working.start()
        assert load.half_done.wait(60)
        os.kill(server.worker_pids()[0], signal.SIGKILL)
        working.join(120)
        assert not working.is_alive()
        found = scrape_until(
            server.url,
            lambda found: (found.total("entrepot_workers"), found.total("entrepot_open_connections")) == (2, 1),
        )
        assert load.lost <= CONNECTIONS
        assert not load.answered - counted(found), "an answer was not counted"
        assert counted(found).total() <= load.answered.total() + load.lost
        assert found.total("entrepot_worker_starts_total") == 3
        assert found.total("entrepot_open_connections") == 1, "a dead worker's connections count"
        before, load = counted(found), Load(server)
        load.run()
        assert counted(scrape(server.url)) - before == load.answered


def test_who_may_read_the_metrics(site: AdminSite) -> None:
    """Admins may read the metrics. Other clients may only if the settings allow their address."""
    ask = httpx2.Client(base_url=site.server.url, trust_env=False)
    with ask:
        assert ask.get("/metrics").status_code == 401
        assert ask.get("/metrics", auth=site.user()).status_code == 403
        answer = ask.get("/metrics", auth=(ADMIN, PASSWORD))
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    assert "entrepot_http_requests_total{" in answer.text


def test_a_registry_without_accounts_shows_its_metrics(tmp_path: Path) -> None:
    """Without accounts, every client may read the metrics."""
    with running_server(tmp_path, workers=1) as server:
        assert scrape(server.url).total("entrepot_workers") == 1


def test_a_port_of_its_own_serves_nothing_else(tmp_path: Path) -> None:
    """Every client that can connect to the port for metrics may read them there. The port serves nothing else."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with running_server(
        tmp_path, "--config", with_settings(tmp_path, f'[metrics]\nlisten = "127.0.0.1:{port}"\n')
    ) as server:
        url = f"http://127.0.0.1:{port}"
        assert plain_request("GET", server.url + "/v2/").status_code == 200
        assert scrape(url).total("entrepot_http_requests_total", route="ping") == 1
        for path in ("/v2/", "/", "/health/live", "/api/v1/me"):
            assert plain_request("GET", url + path).status_code == 404


def test_names_of_distribution(tmp_path: Path) -> None:
    """If the settings ask for them, there are metrics with Distribution's names and labels, and with the same
    values."""
    settings = ALLOWED + "distribution_names = true\n"
    with running_server(tmp_path, "--config", with_settings(tmp_path, settings)) as server:
        with httpx2.Client(base_url=server.url, trust_env=False) as ask:
            for _ in range(3):
                assert ask.get("/v2/").status_code == 200
            assert ask.get("/v2/team/app/manifests/1").status_code == 404
            body = b"x"
            digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
            assert ask.post(f"/v2/team/app/blobs/uploads/?digest={digest}", content=body).status_code == 201
        found = scrape(server.url)
    for handler, method, code, count in (
        ("base", "get", "200", 3),
        ("manifest", "get", "404", 1),
        ("blob_upload", "post", "201", 1),
    ):
        assert found.total("registry_http_requests_total", handler=handler, method=method, code=code) == count
        assert found.total("registry_http_request_duration_seconds_count", handler=handler, method=method) == count
    assert found.total("registry_storage_action_seconds_count", driver="filesystem", action="GetContent") == 1
    assert [value for _, value in found.values("registry_proxy_hits_total", type="blob")] == [0]


def test_no_label_has_the_name_of_a_repository(tmp_path: Path) -> None:
    """No label of a metric has the name of a repository, whatever clients request."""
    with running_server(tmp_path, "--config", with_settings(tmp_path, ALLOWED), workers=1) as server:
        with httpx2.Client(base_url=server.url, trust_env=False) as ask:
            for path in ("/v2/secretname/app/manifests/1", "/v2/secretname/tags/list", "/secretname", "/v2/%zz"):
                ask.get(path)
            ask.request("SECRETNAME", "/v2/")
        answer = plain_request("GET", server.url + "/metrics")
    assert "secretname" not in answer.text.lower()


def test_figures_of_the_store(tmp_path: Path) -> None:
    """The metrics have the sizes of the stored content, the use of quotas, and the space of the disk."""
    settings = ALLOWED + '[[quota]]\nprefix = "team/"\nmax_size = "1GiB"\nmax_tags = 5\n'
    with running_server(tmp_path, "--config", with_settings(tmp_path, settings), workers=1) as server:
        with httpx2.Client(base_url=server.url, trust_env=False) as ask:
            body = b"four"
            digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
            assert ask.post(f"/v2/team/app/blobs/uploads/?digest={digest}", content=body).status_code == 201
            assert ask.post("/v2/team/app/blobs/uploads/").status_code == 202
        found = scrape(server.url)
    assert found.total("entrepot_store_readable") == 1
    assert found.total("entrepot_blobs") == 1
    assert found.total("entrepot_blob_bytes") == 4
    assert found.total("entrepot_open_uploads") == 1
    assert found.total("entrepot_quota_limit_bytes", prefix="team/") == 1 << 30
    assert found.total("entrepot_quota_limit_tags", prefix="team/") == 5
    assert found.total("entrepot_disk_free_bytes") > 0
    assert found.total("entrepot_database_size_bytes") > 0


def test_logins_and_denials_are_counted(site: AdminSite) -> None:
    """Logins are counted by method and outcome, denials by the denied action."""
    user, password = site.user()
    with httpx2.Client(base_url=site.server.url, trust_env=False) as ask:
        before = parse(ask.get("/metrics", auth=(ADMIN, PASSWORD)).text)
        assert ask.get("/v2/", auth=(user, "wrong-password-1")).status_code == 401
        assert ask.post("/v2/nobody/may/blobs/uploads/", auth=(user, password)).status_code in (401, 403, 404)
        after = parse(ask.get("/metrics", auth=(ADMIN, PASSWORD)).text)

    def grown(name: str, **labels: str) -> float:
        return after.total(name, **labels) - before.total(name, **labels)

    assert grown("entrepot_logins_total", method="password", outcome="failed") == 1
    assert grown("entrepot_logins_total", method="password", outcome="ok") >= 1
    assert grown("entrepot_denials_total", action="push") == 1
