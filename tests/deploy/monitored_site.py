"""Runs a registry that has done some work of every kind, and a real Prometheus that scrapes its metrics."""

from __future__ import annotations

import base64
import json
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from tests.fakes.certificate_authority import CertificateBundle, certificates
from tests.fakes.clients.programs import environment, running_daemon
from tests.fakes.commands import entrepot_output
from tests.fakes.hub.hub import hub
from tests.fakes.plain_client import plain_client, plain_request
from tests.fakes.raw_pushes import OCI_MANIFEST, digest_of, image
from tests.fakes.server_process import ROOT, RegistryServer, running_server
from tests.fakes.upstream_content import UpstreamContent, noise_image
from tests.fakes.webhook_receiver import receiver_running

PASSWORD = "correct horse battery"
ADMIN, PERSON = ("admin", PASSWORD), ("bob", PASSWORD)
DEADLINE_SECONDS = 60.0
RULES = ROOT / "deploy" / "prometheus" / "alerts.yml"

SETTINGS = """
[tls]
certificate = "{certificate}"
key = "{key}"

[metrics]
allow = ["127.0.0.0/8"]

[gc]
grace = "0s"

[disk]
min_free = "1MiB"

[cache]
max = "1GiB"

[[upstream]]
name = "docker.io"
default = true
endpoints = ["{hub}"]
cache_max = "1GiB"

[[quota]]
prefix = "team/"
max_size = "1GiB"
max_tags = 100

[[retention]]
repositories = "team/**"
keep_last = 1

[[webhook]]
name = "ci"
url = "{receiver}"
private_network = true

[[webhook]]
name = "refusing"
url = "{refusing}"
private_network = true
max_attempts = 1
"""
PROMETHEUS = """
global: {{ scrape_interval: 1s, evaluation_interval: 1s }}
rule_files: ["{rules}"]
scrape_configs:
  - job_name: entrepot
    scheme: https
    tls_config: {{ insecure_skip_verify: true }}
    static_configs: [{{ targets: ["{target}"] }}]
"""


@dataclass(frozen=True)
class MonitoredSite:
    """A monitored registry. `prometheus`: the URL of Prometheus. `exposition`: the text of the registry's metrics after
    all the work."""

    prometheus: str
    exposition: str

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Returns the current result of a PromQL expression. Raises AssertionError if Prometheus rejects the
        expression."""
        answer = self.ask("query", query=expression)
        return [*answer["result"]]

    def ask(self, path: str, **parameters: str) -> Any:
        """Sends a request to the API of Prometheus, and returns the data of the response."""
        answer = plain_request("GET", f"{self.prometheus}/api/v1/{path}", params=parameters).json()
        assert answer["status"] == "success", (parameters, answer)
        return answer["data"]


@contextmanager
def monitored_site(folder: Path) -> Iterator[MonitoredSite]:
    """Runs the registry, a fake Hub, webhook receivers and Prometheus until the block ends."""
    with ExitStack() as stack:
        content = UpstreamContent()
        for number in range(4):
            content.add("library/app", noise_image(f"app {number}", 1000), str(number))
        upstream = stack.enter_context(hub(folder, content, limit=3))
        receiver, refusing = (stack.enter_context(receiver_running()) for _ in range(2))
        refusing.status = lambda _: 400
        bundle = certificates(folder)
        settings = _write_settings(folder, bundle, hub=upstream.url, receiver=receiver.url, refusing=refusing.url)
        for name, *flags in (("admin", "--admin"), ("bob",)):
            entrepot_output("user", "add", name, *flags, "--password-file", "-", folder=folder, stdin_text=PASSWORD)
        server = stack.enter_context(running_server(folder, "--config", str(settings)))
        prometheus = stack.enter_context(_running_prometheus(folder, server))
        with plain_client(server.url, auth=ADMIN) as client:
            _cause_events(server, client)
            receiver.wait_for(lambda: len(receiver.accepted()) >= 2, "event for the webhook")
            refusing.wait_for(lambda: len(refusing.requests) >= 2, "event for the other webhook")
            yield MonitoredSite(prometheus, client.get("/metrics").text)


def _write_settings(folder: Path, bundle: CertificateBundle, **urls: str) -> Path:
    path = folder / "entrepot.toml"
    path.write_text(SETTINGS.format(certificate=bundle.server, key=bundle.key, **urls))
    return path


@contextmanager
def _running_prometheus(folder: Path, server: RegistryServer) -> Iterator[str]:
    """Runs Debian's Prometheus with the alert rules of this repository until the block ends. Yields its URL."""
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        address = f"127.0.0.1:{reserved.getsockname()[1]}"
    (folder / "prometheus.yml").write_text(PROMETHEUS.format(rules=RULES, target=server.address))
    command = [
        "prometheus",
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'series'}",
        f"--web.listen-address={address}",
    ]
    with running_daemon(
        command, environment(folder / "home"), folder / "prometheus.log", lambda: _is_ready(f"http://{address}")
    ):
        yield f"http://{address}"


def _is_ready(url: str) -> bool:
    try:
        return plain_request("GET", f"{url}/-/ready").status_code == 200
    except httpx2.TransportError:
        return False


def _cause_events(server: RegistryServer, client: httpx2.Client) -> None:
    """Sends pulls, pushes and requests that fail, and runs upkeep jobs, so that all metrics get values."""
    for number in range(3):
        _push(client, str(number))
    for _ in range(5):  # the response cache answers the last of these requests
        assert client.get("/v2/team/app/manifests/2").status_code == 200
    for tag in ("0", "0", "1", "2"):  # three of these requests reach the fake Hub and use up its rate limit
        manifest = client.get(f"/v2/library/app/manifests/{tag}")
        assert manifest.status_code == 200
        for layer in manifest.json()["layers"]:
            assert client.get(f"/v2/library/app/blobs/{layer['digest']}").status_code == 200
    assert client.get("/v2/library/app/manifests/3").status_code == 429
    assert client.post("/v2/team/app/blobs/uploads/").status_code == 202
    with plain_client(server.url) as other:
        assert other.get("/v2/", auth=("bob", "wrong-password")).status_code == 401
        assert other.post("/v2/team/app/blobs/uploads/", auth=PERSON).status_code in (401, 403)
    _abort_upload(server, client)
    for job, request in (("retention", {}), ("gc", {}), ("scrub", {}), ("cache/evict", {"to": 0})):
        _run_job(client, job, request)


def _push(client: httpx2.Client, tag: str) -> None:
    """Pushes an image with one layer."""
    config, layer = b"{}", f"layer {tag}".encode() * 100
    for body in (config, layer):
        location = client.post("/v2/team/app/blobs/uploads/").headers["location"]
        assert (
            client.put(httpx2.URL(location).copy_merge_params({"digest": digest_of(body)}), content=body).status_code
            == 201
        )
    headers = {"content-type": OCI_MANIFEST}
    body = image(config, layer)
    assert client.put(f"/v2/team/app/manifests/{tag}", content=body, headers=headers).status_code == 201


def _abort_upload(server: RegistryServer, client: httpx2.Client) -> None:
    """Starts an upload, and closes the connection in the middle of the body."""
    credential = base64.b64encode(":".join(ADMIN).encode()).decode()
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    location = client.post("/v2/team/app/blobs/uploads/").headers["location"]
    head = (
        f"PATCH {httpx2.URL(location).raw_path.decode()} HTTP/1.1\r\nHost: {server.address}\r\nContent-Length: 1000\r\n"
        f"Authorization: Basic {credential}\r\nContent-Type: application/octet-stream\r\n\r\n"
    )
    with (
        socket.create_connection(("127.0.0.1", server.port)) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as connection,
    ):
        connection.sendall(head.encode() + b"x" * 10)


def _run_job(client: httpx2.Client, name: str, request: dict[str, Any]) -> None:
    """Starts an upkeep job on the server, and waits until it has succeeded."""
    started = client.post(f"/api/v1/{name}", json=request)
    assert started.status_code == 202, started.text
    deadline = time.monotonic() + DEADLINE_SECONDS
    while (job := client.get(f"/api/v1/jobs/{started.json()['id']}").json())["state"] not in (
        "done",
        "failed",
        "stopped",
    ):
        assert time.monotonic() < deadline, json.dumps(job)
    assert job["state"] == "done", json.dumps(job)
