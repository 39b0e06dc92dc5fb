"""A fake of Docker Hub's front end. It runs in a separate process and can fail in every way that a test needs.

    content = UpstreamContent()
    tree = content.add("library/app", noise_image("a", 1000, 5 * MIB), "1", "latest")
    with hub(tmp_path, content, auth="bearer", redirects=True, rate=8 * MIB) as upstream:
        ...                                  # upstream.url: the endpoint for the settings of an [[upstream]]
        upstream.fault(on="blob", drop_after=100_000, times=3)   # the next three responses with blobs break off
        upstream.set(latency=0.2, ranges=False)                  # any field of `switches.Switches`, at any time
        digest = tree.layers[1].digest
        assert upstream.count("manifest", "GET") == 1
        assert repeated(upstream.sent_ranges(digest)) == []             # no byte was sent twice
        assert union(upstream.sent_ranges(digest)) == [(0, 5 * MIB)]    # every byte was sent

- A switch (`switches.Switches`: tokens, redirects, ranges, rate limit, latency, gzip, ...) sets permanent behaviour.
  Switches are passed to `hub(...)` or `set(...)`.
- A fault (`switches.Fault`: status, hangup, stall, stall_after, drop_after, ...) applies to one request, or to as many
  as `times` says. `fault(...)` adds a fault, and `clear()` removes all faults that are not used up.
- `fault(stall=True)` and `fault(stall_after=N)` hold a response until `release()`, so no test needs to sleep.
  `wait(...)` blocks until a number of requests have arrived. If the requests are sent on the test's own event loop, use
  `await upstream.arrival(...)` instead.
- `requests(...)` and `count(...)` return the requests so far. `sent_ranges(digest)` returns which bytes were handed to
  sockets. `forget()` empties this record. If a client disconnects, some bytes that were handed to a socket may not have
  reached it; `send_buffer=65536` keeps their number small. A `drop_after` waits until all sent bytes have reached the
  client.
- `refuse()` makes all ports refuse connections, and `listen()` makes the same ports accept them again. `cut()` resets
  all connections. `put(content)`, `tag(...)` and `remove(...)` change the content. `revoke()` revokes all tokens.
- With `redirects=True`, blobs come from a second port, which answers 400 to requests with Authorization. `auth_url` is
  the URL of a third port, on another host (127.0.0.2), which also has /token: use
  `set(realm=upstream.auth_url + "/token")`.

All calls except the waiting ones take less than a millisecond and start no thread, so coroutines may make them. If an
error occurs in the fake itself, HubFailed is raised when the block ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.fakes.forked_process import ForkedProcess
from tests.fakes.upstream_content import UpstreamContent

from .request_log import Interval, RecordedRequest, repeated, union
from .switches import SWITCHES, Fault, HubRequestKind, Switches

__all__ = ["Fault", "Hub", "HubFailed", "RecordedRequest", "hub", "repeated", "union"]

START_TIMEOUT = 60.0  # seconds
WAIT_TIMEOUT = 60.0  # seconds


class HubFailed(AssertionError):
    """The fake Hub has failed, or a test has made an invalid call."""


@dataclass
class Hub:
    """A running fake Hub."""

    url: str
    cdn_url: str
    auth_url: str
    pid: int
    _folder: Path
    _socket: socket.socket = field(repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def address(self) -> str:
        """`host:port` of `url`."""
        return urlsplit(self.url).netloc

    def set(self, **switches: Any) -> None:
        """Changes switches. A new `limit` counts requests from zero again."""
        if unknown := set(switches) - SWITCHES:
            raise HubFailed(f"there is no switch {', '.join(sorted(unknown))}")
        self._call("set", **switches)

    def fault(self, **what: Any) -> None:
        """Adds a `switches.Fault` to the end of the list of faults."""
        self._call("fault", fault=Fault(**what).as_json())

    def clear(self) -> None:
        """Removes all faults that are not used up."""
        self._call("clear")

    def release(self) -> None:
        """Continues the responses that are stalled now."""
        self._call("release")

    def refuse(self, *, cut: bool = True) -> None:
        """Refuses new connections. Resets existing ones unless `cut` is false."""
        self._call("refuse")
        if cut:
            self.cut()

    def listen(self) -> None:
        """Accepts connections again."""
        self._call("listen")

    def cut(self) -> None:
        """Resets all connections."""
        self._call("cut")

    def put(self, content: UpstreamContent) -> None:
        """Adds repositories, blobs, manifests and tags. Moves tags that exist already."""
        self._call("put", saved=content.save(self._folder))

    def tag(self, repo: str, tag: str, digest: str) -> None:
        """Sets a tag."""
        self._call("tag", repo=repo, tag=tag, digest=digest)

    def remove(self, repo: str, reference: str) -> None:
        """Removes a tag, a manifest with its tags, or a blob from a repository."""
        self._call("remove", repo=repo, reference=reference)

    def revoke(self) -> None:
        """Revokes all tokens issued so far."""
        self._call("revoke")

    def requests(
        self, kind: HubRequestKind | None = None, method: str | None = None, digest: str | None = None, match: str = ""
    ) -> list[RecordedRequest]:
        """Returns the matching requests in order of arrival. `match`: text in the path. `digest`: the digest of a blob
        or a manifest, also if the request named the manifest by tag."""
        return [
            request
            for request in (RecordedRequest(**each) for each in self._call("records"))
            if kind in (None, request.kind) and method in (None, request.method) and digest in (None, request.digest)
            if match in request.path
        ]

    def count(
        self, kind: HubRequestKind | None = None, method: str | None = None, digest: str | None = None, match: str = ""
    ) -> int:
        """Returns the number of matching requests."""
        return len(self.requests(kind, method, digest, match))

    def sent_ranges(self, digest: str) -> list[Interval]:
        """Returns which bytes of a blob or manifest were handed to sockets: one interval for each response that has
        sent any bytes."""
        found = [request.interval for request in self.requests(digest=digest) if request.status in (200, 206)]
        return [interval for interval in found if interval[0] < interval[1]]

    def forget(self) -> None:
        """Deletes the record of all requests so far, including those that are still being answered."""
        self._call("forget")

    @property
    def open(self) -> int:
        """The number of open connections of clients, on all three ports."""
        return int(self._call("state")["open"])

    @property
    def opened(self) -> int:
        """The number of connections of clients accepted so far."""
        return int(self._call("state")["opened"])

    @property
    def faults(self) -> int:
        """The number of faults that are not used up."""
        return int(self._call("state")["faults"])

    def wait(self, count: int = 1, kind: HubRequestKind | None = None, **filters: Any) -> list[RecordedRequest]:
        """Blocks until `count` matching requests have arrived, and returns them. They may not be answered yet."""
        self.until(lambda: self.count(kind, **filters) >= count)
        return self.requests(kind, **filters)

    def until(self, condition: Callable[[], bool], timeout: float = WAIT_TIMEOUT) -> None:
        """Blocks until `condition` returns True. Raises HubFailed after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                raise HubFailed(f"waited in vain; there were {self.requests()}")
            time.sleep(0.005)

    async def arrival(
        self, count: int = 1, kind: HubRequestKind | None = None, **filters: Any
    ) -> list[RecordedRequest]:
        """Does what `wait` does, without blocking the event loop."""
        await self.until_async(lambda: self.count(kind, **filters) >= count)
        return self.requests(kind, **filters)

    async def until_async(self, condition: Callable[[], bool]) -> None:
        """Does what `until` does, without blocking the event loop."""
        deadline = time.monotonic() + WAIT_TIMEOUT
        while not condition():
            if time.monotonic() > deadline:
                raise HubFailed(f"waited in vain; there were {self.requests()}")
            await asyncio.sleep(0.005)

    def _call(self, name: str, **arguments: Any) -> Any:
        with self._lock:
            self._socket.sendall(json.dumps([name, arguments]).encode() + b"\n")
            answer = b""
            while not answer.endswith(b"\n"):
                piece = self._socket.recv(1 << 20)
                if not piece:
                    raise HubFailed("the fake Hub has ended")
                answer += piece
        reply = json.loads(answer)
        if "error" in reply:
            raise HubFailed(reply["error"])
        return reply["result"]

    def _errors(self) -> list[str]:
        return list(self._call("state")["errors"])


@contextlib.contextmanager
def hub(tmp_path: Path, content: UpstreamContent | None = None, **switches: Any) -> Iterator[Hub]:
    """Runs a fake Hub with this content until the block ends. Several fake Hubs can use the same folder."""
    folder = Path(tempfile.mkdtemp(prefix="hub-", dir=tmp_path))
    setup = {"content": (content or UpstreamContent()).save(folder), "switches": _json(Switches(**switches))}
    with (folder / "log").open("ab") as log:
        process = ForkedProcess(
            f"{__package__}.control", cwd=folder, env=os.environ, stdin=subprocess.PIPE, stderr=log.fileno()
        )
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        try:
            process.stdin.write(json.dumps(setup) + "\n")
            process.stdin.flush()
            reply = process.stdout.readline()
            if not reply:
                raise HubFailed(f"the fake Hub did not start:\n{(folder / 'log').read_text()}")
            ports = json.loads(reply)
            with socket.create_connection(("127.0.0.1", ports["control"]), START_TIMEOUT) as control:
                started = Hub(ports["registry"], ports["cdn"], ports["auth"], process.pid, folder, control)
                yield started
                if errors := started._errors():
                    raise HubFailed("\n".join(errors))
        finally:
            process.kill()


def _json(switches: Switches) -> dict[str, Any]:
    return {**vars(switches)}
