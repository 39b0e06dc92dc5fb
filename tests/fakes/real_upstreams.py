"""Runs real registries as upstreams: Debian's docker-registry, nginx in front of a registry as a slow link, and
Entrepot itself.

    with docker_registry(tmp_path, content) as far, slow_link(tmp_path, far.url, "8m") as link:
        ...                                    # link.url: the same registry at 8 MiB/s for each request
    with slow_link(tmp_path, far.url, certificates=certificates(tmp_path)) as link:     # the same registry with TLS
    with docker_registry(tmp_path, remote=upstream.url) as proxy:      # docker-registry as a pull-through cache
    with entrepot(tmp_path, content) as far:                           # `entrepot serve` with two workers

All programs listen on free loopback ports. They end with their block, or with the process that started them.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from tests.fakes.clients.programs import environment, log_tail, wait_until
from tests.fakes.server_process import ROOT, running_server

from .certificate_authority import CertificateBundle
from .upstream_content import Noise, UpstreamBlob, UpstreamContent

TIMEOUT = 60.0  # seconds
LISTENING = re.compile(r"listening on (127\.0\.0\.1:\d+)")


@dataclass(frozen=True)
class RunningProgram:
    """A running server program."""

    url: str
    log: Path
    process: subprocess.Popen[bytes]

    @property
    def address(self) -> str:
        """`host:port`."""
        return urlsplit(self.url).netloc

    def stop(self) -> None:
        """Kills the program, as if the upstream were switched off: its port then refuses connections."""
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def docker_registry(
    tmp_path: Path, content: UpstreamContent | None = None, *, remote: str = "", listen: str = "127.0.0.1:0"
) -> Iterator[RunningProgram]:
    """Runs Debian's docker-registry with this content until the block ends. `remote`: the URL of the registry that it
    mirrors as a pull-through cache; empty: it mirrors none."""
    folder = Path(tempfile.mkdtemp(prefix="docker-registry-", dir=tmp_path))
    config: dict[str, object] = {
        "version": "0.1",
        "log": {"level": "info"},
        "storage": {
            "filesystem": {"rootdirectory": str(folder / "data")},
            "cache": {"blobdescriptor": "inmemory"},
            "delete": {"enabled": True},
        },
        "http": {"addr": listen, "secret": "tests"},
    }
    if remote:
        config["proxy"] = {"remoteurl": remote}
    (folder / "config.yml").write_text(json.dumps(config))  # JSON is YAML
    log = folder / "log"
    with _program(["docker-registry", "serve", str(folder / "config.yml")], folder) as process:
        wait_until(
            lambda: bool(LISTENING.search(log_tail(log))),
            TIMEOUT,
            lambda: f"docker-registry:\n{log_tail(log)}",
            process,
        )
        found = LISTENING.search(log.read_text())
        assert found
        started = RunningProgram(f"http://{found[1]}", log, process)
        if content:
            push(started.address, content)
        yield started


@contextlib.contextmanager
def slow_link(
    tmp_path: Path, url: str, rate: str = "0", certificates: CertificateBundle | None = None
) -> Iterator[RunningProgram]:
    """Runs nginx in front of the server at `url` until the block ends. `rate`: bytes per second for each request, in
    nginx's notation (`8m`); 0: no limit. `certificates`: the certificates for TLS; None: plain HTTP."""
    folder = Path(tempfile.mkdtemp(prefix="nginx-", dir=tmp_path))
    log = folder / "log"
    # This socket is bound to the port but does not listen, so that only nginx can listen on the port.
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        (folder / "nginx.conf").write_text(_nginx_config(folder, port, urlsplit(url).netloc, rate, certificates))
        command = ["nginx", "-p", str(folder), "-e", str(log), "-c", str(folder / "nginx.conf")]
        with _program(command, folder) as process:
            wait_until(lambda: _listens(port), TIMEOUT, lambda: f"nginx:\n{log_tail(log)}", process)
            yield RunningProgram(f"{'https' if certificates else 'http'}://127.0.0.1:{port}", log, process)


@contextlib.contextmanager
def entrepot(tmp_path: Path, content: UpstreamContent | None = None, *args: str, workers: int = 2) -> Iterator[str]:
    """Runs `entrepot serve` with this content until the block ends. Yields its URL."""
    with running_server(Path(tempfile.mkdtemp(prefix="entrepot-", dir=tmp_path)), *args, workers=workers) as server:
        if content:
            push(server.address, content)
        yield server.url


def push(address: str, content: UpstreamContent) -> None:
    """Pushes all content to the registry at `host:port`."""
    with contextlib.closing(http.client.HTTPConnection(address, timeout=TIMEOUT)) as connection:
        for repo, repository in content.repositories.items():
            for blob in repository.blobs.values():
                _push_blob(connection, repo, blob)
            # A registry refuses an index whose manifests are missing. `manifests` has them before the index.
            for digest, (body, media_type) in repository.manifests.items():
                _ask(connection, "PUT", f"/v2/{repo}/manifests/{digest}", body, {"Content-Type": media_type})
            for tag, digest in repository.tags.items():
                body, media_type = repository.manifests[digest]
                _ask(connection, "PUT", f"/v2/{repo}/manifests/{tag}", body, {"Content-Type": media_type})


def _push_blob(connection: http.client.HTTPConnection, repo: str, blob: UpstreamBlob) -> None:
    session = urlsplit(_ask(connection, "POST", f"/v2/{repo}/blobs/uploads/", b"", {}))
    target = f"{session.path}?{session.query}{'&' if session.query else ''}digest={blob.digest}"
    headers = {"Content-Type": "application/octet-stream", "Content-Length": str(blob.size)}
    body = blob.body.pieces(0, blob.size) if isinstance(blob.body, Noise) else blob.body
    _ask(connection, "PUT", target, body, headers)


def _ask(
    connection: http.client.HTTPConnection,
    method: str,
    target: str,
    body: bytes | Iterator[memoryview],
    headers: Mapping[str, str],
) -> str:
    """Sends a request, checks that it succeeds, and returns the Location of the response."""
    connection.request(method, target, body, dict(headers))
    response = connection.getresponse()
    body_text = response.read()
    assert response.status in (201, 202), f"{method} {target}: {response.status} {body_text!r}"
    return response.headers.get("Location", "")


def _nginx_config(folder: Path, port: int, target: str, rate: str, certificates: CertificateBundle | None) -> str:
    paths = "".join(
        f"    {name}_temp_path {folder}/{name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    secure = ""
    if certificates:
        secure = f"ssl_certificate {certificates.server}; ssl_certificate_key {certificates.key};"
    # nginx runs as a single process, so that no process is left behind when it is killed.
    return f"""\
daemon off;
master_process off;
pid {folder}/pid;
error_log {folder}/log;
events {{ worker_connections 1024; }}
http {{
    access_log {folder}/access.log;
{paths}    keepalive_requests 100000;
    upstream far {{ server {target}; keepalive 64; }}
    server {{
        listen 127.0.0.1:{port} backlog=1024{" ssl" if certificates else ""};
        {secure}
        location / {{
            proxy_pass http://far;
            proxy_http_version 1.1;
            proxy_set_header Host $http_host;
            proxy_set_header Connection "";
            proxy_max_temp_file_size 0;
            limit_rate {rate};
        }}
    }}
}}
"""


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), TIMEOUT).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _program(command: Sequence[str], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a program until the block ends. The program writes to `folder/log`."""
    env = {**environment(folder / "home"), "PYTHONPATH": str(ROOT)}
    with (folder / "log").open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.fakes.die_with_parent", str(os.getpid()), *command],
            cwd=folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        yield process
    finally:
        RunningProgram("", folder / "log", process).stop()
