"""Runs nginx as a proxy in front of the upstream. nginx logs how many bytes the upstream sends, and can limit the rate
of each response."""

from __future__ import annotations

import contextlib
import grp
import json
import os
import pwd
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench.system.programs import STOP_TIMEOUT, running_program
from bench.system.servers import HOST, free_port, is_serving, local_url

NGINX_CONFIG = """\
daemon off;
user {user} {group};
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 1024; }}
http {{
    log_format seen escape=json
        '{{"method":"$request_method","path":"$uri","status":$status,"body":$body_bytes_sent}}';
    access_log {folder}/access.log seen;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    keepalive_requests 100000;
    upstream origin {{
        server {host}:{origin};
        keepalive 64;
    }}
    server {{
        listen {host}:{port} backlog=1024;
        location / {{
            proxy_pass http://origin;
            proxy_http_version 1.1;
            proxy_set_header Host $http_host;
            proxy_set_header Connection "";
            proxy_buffers 16 64k;
            proxy_max_temp_file_size 0;
            {limit}
        }}
    }}
}}
"""


@dataclass(frozen=True)
class UpstreamTraffic:
    """The bytes that the upstream sent for one repository, and the number of requests that it answered."""

    content: int = 0
    """Bytes of manifests and blobs."""
    blobs: int = 0
    """Bytes of blobs."""
    manifest_gets: int = 0
    """Number of successful GETs of manifests."""
    manifest_heads: int = 0


def count_traffic(lines: Iterable[str], repo: str) -> UpstreamTraffic:
    """Sums up the lines of an access log for one repository. An interrupted request counts with the bytes that were
    sent for it. A refused request does not count."""
    content = blobs = gets = heads = 0
    for line in lines:
        request = json.loads(line)
        repo_path, _, kind = request["path"].rpartition("/")[0].rpartition("/")
        if repo_path != f"/v2/{repo}" or kind not in ("manifests", "blobs") or request["status"] not in (200, 206):
            continue
        content += request["body"]
        if kind == "blobs":
            blobs += request["body"]
        elif request["method"] == "GET":
            gets += 1
        else:
            heads += 1
    return UpstreamTraffic(content, blobs, gets, heads)


@dataclass(frozen=True)
class NginxProxy:
    """A running nginx."""

    port: int
    log: Path

    @property
    def url(self) -> str:
        return local_url(self.port)

    def sent(self, repo: str) -> UpstreamTraffic:
        """Returns the traffic of all requests that have ended, because nginx logs a request when it ends. The traffic
        is complete once the block of `running_nginx` has ended."""
        return count_traffic(self.log.read_text().splitlines(), repo)


@contextlib.contextmanager
def running_nginx(origin: int, folder: Path, limit: str | None = None) -> Iterator[NginxProxy]:
    """Runs nginx in front of the server on port `origin` until the block ends. `limit`: bytes a second for each
    request, in nginx's notation (`8m`). Raises BenchFailed."""
    folder.mkdir(parents=True)
    port = free_port()
    config = folder / "nginx.conf"
    config.write_text(
        NGINX_CONFIG.format(
            folder=folder,
            host=HOST,
            port=port,
            origin=origin,
            limit=f"limit_rate {limit};" if limit else "",
            # Debian's nginx would drop root for www-data, which has no access to the folder.
            user=pwd.getpwuid(os.geteuid()).pw_name,
            group=grp.getgrgid(os.getegid()).gr_name,
        )
    )
    command = ["nginx", "-e", str(folder / "error.log"), "-p", str(folder), "-c", str(config)]
    with running_program(command, folder / "error.log", ready=partial(is_serving, port)) as process:
        yield NginxProxy(port, folder / "access.log")
        process.send_signal(signal.SIGQUIT)  # nginx ends once every request has ended and is in the log
        process.wait(STOP_TIMEOUT)
