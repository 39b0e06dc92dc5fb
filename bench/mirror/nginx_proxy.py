"""nginx before the upstream: it writes down what the upstream sends, and can be as slow as a far link."""

from __future__ import annotations

import contextlib
import grp
import json
import os
import pwd
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.errors import BenchFailed
from bench.loaders.http_client import HOST
from bench.mirror.mirror_servers import local_url
from bench.system.process_tree import STOP_TIMEOUT, clean_environment, log_tail, running_program
from bench.system.servers import START_TIMEOUT, free_port, is_serving

POLL_SECONDS = 0.005
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
    """What the upstream sent."""

    content: int = 0
    """Bytes of manifests and blobs."""
    blobs: int = 0
    """Bytes of blobs."""
    manifest_gets: int = 0
    """GETs of manifests that were answered with one."""
    manifest_heads: int = 0


def count_traffic(lines: Iterable[str], repo: str) -> UpstreamTraffic:
    """What the lines of an access log come to for one repository. A request that was broken off counts with the bytes
    it was sent; one that was refused does not count."""
    content = blobs = gets = heads = 0
    for line in lines:
        seen = json.loads(line)
        where, _, kind = seen["path"].rpartition("/")[0].rpartition("/")
        if where != f"/v2/{repo}" or kind not in ("manifests", "blobs") or seen["status"] not in (200, 206):
            continue
        content += seen["body"]
        if kind == "blobs":
            blobs += seen["body"]
        elif seen["method"] == "GET":
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
        """So far: a request counts from its end on. It is complete once the block of `running_nginx` has ended."""
        return count_traffic(self.log.read_text().splitlines(), repo)


@contextlib.contextmanager
def running_nginx(origin: int, folder: Path, limit: str | None = None) -> Iterator[NginxProxy]:
    """nginx before the server on port `origin`, until the block ends; `limit`: bytes a second for each request, as
    nginx writes them (`8m`). Raises BenchFailed."""
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
            # Debian's nginx would leave root for www-data, who may not enter the folder.
            user=pwd.getpwuid(os.geteuid()).pw_name,
            group=grp.getgrgid(os.getegid()).gr_name,
        )
    )
    command = ["nginx", "-e", str(folder / "error.log"), "-p", str(folder), "-c", str(config)]
    log = folder / "output"
    with running_program(command, clean_environment(folder), log, folder) as process:
        deadline = time.monotonic() + START_TIMEOUT
        while not is_serving(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise BenchFailed(f"nginx did not start: {log_tail(log)}{log_tail(folder / 'error.log')}")
            time.sleep(POLL_SECONDS)
        yield NginxProxy(port, folder / "access.log")
        # It ends once every request has ended and is in the log.
        process.send_signal(signal.SIGQUIT)
        process.wait(STOP_TIMEOUT)
