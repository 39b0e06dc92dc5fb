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
from bench.mirror.mirrors import address
from bench.processes import END_TIMEOUT, environment, program, tail
from bench.servers import START_TIMEOUT, answers, free_port
from bench.wire import HOST

POLL = 0.005
CONFIG = """\
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
class Sent:
    """What the upstream sent."""

    content: int = 0
    """Bytes of manifests and blobs."""
    blobs: int = 0
    """Bytes of blobs."""
    manifest_gets: int = 0
    """GETs of manifests that were answered with one."""
    manifest_heads: int = 0


def count(lines: Iterable[str], repo: str) -> Sent:
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
    return Sent(content, blobs, gets, heads)


@dataclass(frozen=True)
class Gate:
    """A running nginx."""

    port: int
    log: Path

    @property
    def url(self) -> str:
        return address(self.port)

    def sent(self, repo: str) -> Sent:
        """So far: a request counts from its end on. It is complete once the block of `gate` has ended."""
        return count(self.log.read_text().splitlines(), repo)


@contextlib.contextmanager
def gate(origin: int, folder: Path, limit: str | None = None) -> Iterator[Gate]:
    """nginx before the server on port `origin`, until the block ends; `limit`: bytes a second for each request, as
    nginx writes them (`8m`). Raises BenchFailed."""
    folder.mkdir(parents=True)
    port = free_port()
    config = folder / "nginx.conf"
    config.write_text(
        CONFIG.format(
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
    with program(command, environment(folder), log, folder) as process:
        deadline = time.monotonic() + START_TIMEOUT
        while not answers(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise BenchFailed(f"nginx did not start: {tail(log)}{tail(folder / 'error.log')}")
            time.sleep(POLL)
        yield Gate(port, folder / "access.log")
        # It ends once every request has ended and is in the log.
        process.send_signal(signal.SIGQUIT)
        process.wait(END_TIMEOUT)
