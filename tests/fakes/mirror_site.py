"""A real server with two workers that mirrors a fake Hub, and HTTP clients that can choose the worker that answers."""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx2

from storage.blobs.files.partial_state_format import read_progress
from storage.data_dir.layout import Layout
from storage.names import Digest
from tests.fakes.client_images import MIB
from tests.fakes.connection_owner import accepting_process
from tests.fakes.hub.hub import Hub, hub
from tests.fakes.hub.request_log import Interval
from tests.fakes.hub.switches import HubRequestKind
from tests.fakes.open_files import open_files
from tests.fakes.plain_client import plain_client
from tests.fakes.rechunking_proxy import RechunkingProxy, rechunking_proxy
from tests.fakes.server_process import RegistryServer, running_server
from tests.fakes.upstream_content import ImageTree, UpstreamContent, noise_image

SIZE = 3 * MIB  # bytes
TIMEOUT = 60.0  # seconds
REPO = "library/app"


class BackgroundGet:
    """A client that sends one GET on its own connection and in its own thread. `body`: the bytes received so far.
    `hold`: the client reads the body only after this event is set."""

    def __init__(
        self,
        connection: http.client.HTTPConnection,
        path: str,
        headers: Mapping[str, str],
        hold: threading.Event | None = None,
    ) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = bytearray()
        self._connection = connection
        self._ended = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, args=(path, headers, hold), daemon=True)
        self._thread.start()

    @property
    def is_complete(self) -> bool:
        """Whether the complete body, by its Content-Length, was received."""
        return self.status in (200, 206) and len(self.body) == int(self.headers["content-length"])

    def wait_for_headers(self) -> BackgroundGet:
        """Waits until the headers have arrived."""
        return self._until(lambda: self.status > 0)

    def wait_for_bytes(self, count: int) -> BackgroundGet:
        """Waits until at least `count` bytes of the body have arrived."""
        return self._until(lambda: len(self.body) >= count)

    def wait_for_end(self) -> BackgroundGet:
        """Waits until the response has ended, completely or not."""
        self._thread.join(TIMEOUT)
        assert not self._thread.is_alive(), f"no end after {len(self.body)} bytes"
        return self

    def leave(self) -> None:
        """Closes the connection before the end of the response."""
        with suppress(OSError):
            self._connection.sock.shutdown(socket.SHUT_RDWR)
        self.wait_for_end()

    def _until(self, condition: Callable[[], bool]) -> BackgroundGet:
        with self._changed:
            assert self._changed.wait_for(lambda: self._ended or condition(), TIMEOUT), (
                f"timed out; {len(self.body)} bytes of the body received"
            )
        assert condition(), f"the response ended with status {self.status} after {len(self.body)} bytes"
        return self

    def _run(self, path: str, headers: Mapping[str, str], hold: threading.Event | None) -> None:
        try:
            self._connection.request("GET", path, headers=dict(headers))
            answer = self._connection.getresponse()
            with self._changed:
                self.headers = {name.lower(): value for name, value in answer.getheaders()}
                self.status = answer.status
                self._changed.notify_all()
            if hold is not None:
                hold.wait(TIMEOUT)
            while data := answer.read1(256 * 1024):
                with self._changed:
                    self.body += data
                    self._changed.notify_all()
        except (OSError, http.client.HTTPException):
            pass  # the test checks the status and the received bytes
        finally:
            self._connection.close()
            with self._changed:
                self._ended = True
                self._changed.notify_all()


class MirrorSite:
    """A mirror and its upstream. The upstream has the image `image` as `library/app:1`; `blob` is its last layer."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self._stack = stack
        self.content = UpstreamContent()
        self.image: ImageTree
        self.hub: Hub
        self.other: Hub
        self.proxy: RechunkingProxy
        self.server: RegistryServer
        self.http: httpx2.Client

    def start(
        self,
        *sizes: int,
        settings: str = "",
        more: str = "",
        endpoints: int = 1,
        rechunked: bool = False,
        **switches: Any,
    ) -> MirrorSite:
        """Starts the upstream and the server. `sizes`: the sizes of the layers. `settings`: settings of the upstream;
        `more`: settings of the server. `endpoints`: the number of fake Hubs that are endpoints of the upstream; the
        first is `hub`, the last is `other`. `rechunked`: whether `proxy` is in front of `hub`."""
        self.image = self.content.add(REPO, noise_image("app", *(sizes or (1000, SIZE))), "1", "latest")
        switches = {"auth": "bearer", "redirects": not rechunked, "send_buffer": 65536, **switches}
        hubs = [self.upstream(self.content, **switches) for _ in range(endpoints)]
        self.hub, self.other = hubs[0], hubs[-1]
        urls = [each.url for each in hubs]
        if rechunked:
            self.proxy = self._stack.enter_context(rechunking_proxy(self.hub.url))
            urls[0] = self.proxy.url
        (self.folder / "entrepot.toml").write_text(
            f'{more}\n[[upstream]]\nname = "docker.io"\ndefault = true\nendpoints = {json.dumps(urls)}\n{settings}\n'
        )
        self.serve()
        return self

    def upstream(self, content: UpstreamContent, **switches: Any) -> Hub:
        """Starts another fake Hub with this content."""
        return self._stack.enter_context(hub(self.folder, content, **switches))

    def serve(self) -> None:
        """Starts the server. May be called again to start it on the same data directory."""
        config = str(self.folder / "entrepot.toml")
        self.server = self._stack.enter_context(running_server(self.folder, "--config", config))
        self.http = self._stack.enter_context(plain_client(self.server.url, timeout=TIMEOUT))

    def get_manifest(self, reference: str = "1") -> httpx2.Response:
        """Gets the manifest of the image from the mirror, as a client does at the start of a pull."""
        answer = self.http.get(f"/v2/{REPO}/manifests/{reference}")
        assert answer.status_code == 200, answer.text
        return answer

    @property
    def digest(self) -> str:
        return self.image.layers[-1].digest

    @property
    def size(self) -> int:
        return self.image.layers[-1].size

    @property
    def blob(self) -> bytes:
        return self.image.layers[-1].read()

    @property
    def digest_hex(self) -> str:
        """The encoded part of the blob's digest. It is in the path of all upstream requests for the blob."""
        return self.digest.partition(":")[2]

    @property
    def path(self) -> str:
        return f"/v2/{REPO}/blobs/{self.digest}"

    def get(
        self,
        path: str | None = None,
        span: str = "",
        *,
        worker: int | None = None,
        hold: threading.Event | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> BackgroundGet:
        """Requests the blob, or `path`. `span`: a range such as `0-99` for the Range header. `worker`: the process id
        of the worker that must accept the connection; None: any worker. `hold`: see `BackgroundGet`."""
        all_headers = {**(headers or {}), **({"Range": f"bytes={span}"} if span else {})}
        return BackgroundGet(self._connect(worker, slow=hold is not None), path or self.path, all_headers, hold)

    def finish(self, request: BackgroundGet) -> bytes:
        """Waits for the end of a request for the blob, and requests the missing bytes with Range until the blob is
        complete. Returns all bytes."""
        body = bytes(request.wait_for_end().body)
        for _ in range(20):
            if len(body) == self.size:
                return body
            answer = self.get(span=f"{len(body)}-").wait_for_end()
            assert answer.status in (0, 206), answer
            body += answer.body
        raise AssertionError(f"only {len(body)} bytes after 20 responses")

    def _connect(self, worker: int | None, *, slow: bool) -> http.client.HTTPConnection:
        """Returns a connection that the worker has accepted. `slow`: with a small receive buffer, so that the server
        cannot send much before the client reads."""
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline:
            connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=TIMEOUT)
            sock = socket.socket()
            if slow:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)
            sock.settimeout(TIMEOUT)
            sock.connect(("127.0.0.1", self.server.port))
            connection.sock = sock
            if worker is None or worker_of(self.server, sock.getsockname()[1]) == worker:
                return connection
            connection.close()
        raise AssertionError(f"no connection came to worker {worker}")

    def count_requests(self, kind: HubRequestKind | None = None, *, match: str = "", far: Hub | None = None) -> int:
        """Returns how many requests the fake Hub `far` has received, or `self.hub` if `far` is None. Requests that the
        Hub answered with 401 do not count. HEAD requests for manifests do not count either, because Docker Hub does not
        count them."""
        found = [request for request in (far or self.hub).requests(kind, match=match) if request.status != 401]
        return sum(1 for request in found if (request.kind, request.method) != ("manifest", "HEAD"))

    # Files on the disk

    def extents(self) -> list[Interval]:
        """Returns which bytes of the partial blob (a blob that is still being downloaded) are stored. The worker that
        downloads it, its owner, writes this to the state file for all processes."""
        state = self._state()
        for _ in range(1000):
            fd = os.open(state, os.O_RDONLY)
            try:
                if (progress := read_progress(fd)) is not None:
                    return list(progress.extents)
            finally:
                os.close(fd)
        raise AssertionError("the state file cannot be read")

    def owner(self) -> int:
        """Returns the worker that owns the partial blob: it has locked the first byte of the state file (proc(5),
        fdinfo)."""
        state = str(self._state())
        for pid in self.server.worker_pids():
            for fd in open_files(pid, state):
                if re.search(r"OFDLCK .* WRITE .* 0 0$", Path(f"/proc/{pid}/fdinfo/{fd}").read_text(), re.MULTILINE):
                    return pid
        raise AssertionError("no worker owns the partial blob")

    def _state(self) -> Path:
        layout = Layout(self.server.data)
        return layout.partial_state(layout.partial_name(Digest(self.digest), self.size, "docker.io"))

    def stored_files(self) -> list[str]:
        """Returns the paths of all files of the blob in the data directory."""
        return [str(path) for path in self.server.data.rglob(f"*{self.digest_hex}*")]

    def refetched(self, intervals: Collection[Interval], since: float) -> list[Interval]:
        """Returns which bytes of `intervals` the upstream has sent again, in responses to requests after
        the time `since`."""
        later_requests = [each for each in self.hub.requests("blob", digest=self.digest) if each.begun > since]
        return overlap((each.interval for each in later_requests), intervals)


def overlap(first: Iterable[Interval], second: Collection[Interval]) -> list[Interval]:
    """Returns the parts of the intervals in `first` that also lie in intervals of `second`."""
    found = [(max(a, c), min(b, d)) for a, b in first for c, d in second]
    return [each for each in found if each[0] < each[1]]


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Calls `condition` again and again until it returns True. `what`: the awaited fact, for the error message."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.005)


def worker_of(server: RegistryServer, port: int) -> int:
    """Returns the process id of the worker that has accepted the connection from the client port `port`."""
    deadline = time.monotonic() + TIMEOUT
    while (pid := accepting_process(server.port, port, server.worker_pids())) is None:
        assert time.monotonic() < deadline, f"no worker has the connection from {port}"
        time.sleep(0.005)
    return pid
