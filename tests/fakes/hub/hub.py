"""A stand-in for Docker Hub's front, in a process of its own, that can go wrong in every way a test wants.

    content = Content()
    held = content.add("library/app", noise_image("a", 1000, 5 * MIB), "1", "latest")
    with hub(tmp_path, content, auth="bearer", redirects=True, rate=8 * MIB) as upstream:
        ...                                  # upstream.url is what an [[upstream]] names as its endpoint
        upstream.fault(on="blob", drop_after=100_000, times=3)   # the next three answers with a blob's bytes break
        upstream.set(latency=0.2, ranges=False)                  # any field of `switches.Switches`, at any time
        digest = held.layers[1].digest
        assert upstream.count("manifest", "GET") == 1
        assert repeated(upstream.sent(digest)) == []             # no byte was sent twice
        assert union(upstream.sent(digest)) == [(0, 5 * MIB)]    # and every byte was

- What stands is a switch (`switches.Switches`: tokens, redirects, ranges, rate limit, latency, rate, gzip, ...): given
  to `hub(...)` or `set(...)`. What happens to some requests is a fault (`switches.Fault`: status, hangup, stall,
  stall_after, drop_after, corrupt, ...): `fault(...)`; one request, if `times` says nothing else. `clear()` drops the
  faults that are left.
- `fault(stall=True)` and `fault(stall_after=N)` hold an answer until `release()`: to see what happens meanwhile, no
  test needs to sleep. `wait(...)` blocks until so many requests have come; where what sends them runs on the test's own
  event loop, it is `await upstream.arrival(...)`.
- `requests(...)`, `count(...)`, `sent(digest)` say what was asked for and handed to the socket so far; `forget()`
  empties that record. What was handed to the socket of a client that breaks off may not all have arrived; with
  `send_buffer=65536` little is under way. A `drop_after` waits for the arrival of what was sent.
- `refuse()` stops listening (connections are refused) and `listen()` begins again on the same ports; `cut()` resets
  all connections. `put(content)`, `tag(...)`, `remove(...)` change what it holds; `revoke()` makes all tokens bad.
- Blobs by `redirects=True` come from a second port, which answers 400 to whoever sends Authorization there.
  `auth_url` is a third, on another host (127.0.0.2), that has /token too: `set(realm=upstream.auth_url + "/token")`.

The calls block for less than a millisecond, start no thread and may be made from a coroutine. A bug of the stand-in
shows itself as a StandInFailed when the block ends.
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

from .request_log import Interval, SeenRequest, repeated, union
from .switches import SWITCHES, Fault, HubRequestKind, Switches

__all__ = ["Fault", "Hub", "HubFailed", "SeenRequest", "hub", "repeated", "union"]

START_TIMEOUT = 60.0
WAIT_TIMEOUT = 60.0


class HubFailed(AssertionError):
    """The stand-in itself does not work, or was asked for something that there is not."""


@dataclass
class Hub:
    """A running stand-in."""

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
        """Changes switches. A new `limit` begins to count anew."""
        if unknown := set(switches) - SWITCHES:
            raise HubFailed(f"there is no switch {', '.join(sorted(unknown))}")
        self._call("set", **switches)

    def fault(self, **what: Any) -> None:
        """Adds a `switches.Fault` behind those that are there."""
        self._call("fault", fault=Fault(**what).as_json())

    def clear(self) -> None:
        """Drops the faults that are left."""
        self._call("clear")

    def release(self) -> None:
        """Lets go on what is stalled now."""
        self._call("release")

    def refuse(self, *, cut: bool = True) -> None:
        """Refuses connections, and resets those there are unless told otherwise."""
        self._call("refuse")
        if cut:
            self.cut()

    def listen(self) -> None:
        """Takes connections again."""
        self._call("listen")

    def cut(self) -> None:
        """Resets all connections."""
        self._call("cut")

    def put(self, content: UpstreamContent) -> None:
        """Adds repositories, blobs, manifests and tags; a tag that is there moves."""
        self._call("put", saved=content.save(self._folder))

    def tag(self, repo: str, tag: str, digest: str) -> None:
        """Moves a tag, or makes it."""
        self._call("tag", repo=repo, tag=tag, digest=digest)

    def remove(self, repo: str, reference: str) -> None:
        """Removes a tag, a manifest with its tags, or a blob from a repository."""
        self._call("remove", repo=repo, reference=reference)

    def revoke(self) -> None:
        """Makes every token bad that was given so far."""
        self._call("revoke")

    def requests(
        self, kind: HubRequestKind | None = None, method: str | None = None, digest: str | None = None, match: str = ""
    ) -> list[SeenRequest]:
        """What was asked for, in the order of its arrival. `match`: text in the path. A HEAD or GET of a manifest has
        the digest that was answered."""
        return [
            seen
            for seen in (SeenRequest(**each) for each in self._call("seen"))
            if kind in (None, seen.kind) and method in (None, seen.method) and digest in (None, seen.digest)
            if match in seen.path
        ]

    def count(
        self, kind: HubRequestKind | None = None, method: str | None = None, digest: str | None = None, match: str = ""
    ) -> int:
        """How many `requests` there were."""
        return len(self.requests(kind, method, digest, match))

    def sent(self, digest: str) -> list[Interval]:
        """Which bytes of a blob or manifest were handed to sockets: one interval per answer with any."""
        found = [seen.interval for seen in self.requests(digest=digest) if seen.status in (200, 206)]
        return [interval for interval in found if interval[0] < interval[1]]

    def forget(self) -> None:
        """Empties the record of requests. Those under way are in it no more."""
        self._call("forget")

    @property
    def open(self) -> int:
        """Connections from clients now, on all three ports."""
        return int(self._call("state")["open"])

    @property
    def opened(self) -> int:
        """Connections from clients so far."""
        return int(self._call("state")["opened"])

    @property
    def faults(self) -> int:
        """How many faults are not used up."""
        return int(self._call("state")["faults"])

    def wait(self, count: int = 1, kind: HubRequestKind | None = None, **filters: Any) -> list[SeenRequest]:
        """Returns when so many of these `requests` have come, which need not be answered yet. Blocks."""
        self.until(lambda: self.count(kind, **filters) >= count)
        return self.requests(kind, **filters)

    def until(self, true: Callable[[], bool], timeout: float = WAIT_TIMEOUT) -> None:
        """Asks again and again, and blocks meanwhile. Raises StandInFailed when time is up."""
        deadline = time.monotonic() + timeout
        while not true():
            if time.monotonic() > deadline:
                raise HubFailed(f"waited in vain; there were {self.requests()}")
            time.sleep(0.005)

    async def arrival(self, count: int = 1, kind: HubRequestKind | None = None, **filters: Any) -> list[SeenRequest]:
        """As `wait`, and the event loop goes on meanwhile."""
        await self.until_async(lambda: self.count(kind, **filters) >= count)
        return self.requests(kind, **filters)

    async def until_async(self, true: Callable[[], bool]) -> None:
        """As `until`, and the event loop goes on meanwhile."""
        deadline = time.monotonic() + WAIT_TIMEOUT
        while not true():
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
                    raise HubFailed("the stand-in has ended")
                answer += piece
        said = json.loads(answer)
        if "error" in said:
            raise HubFailed(said["error"])
        return said["result"]

    def _errors(self) -> list[str]:
        return list(self._call("state")["errors"])


@contextlib.contextmanager
def hub(tmp_path: Path, content: UpstreamContent | None = None, **switches: Any) -> Iterator[Hub]:
    """Runs a stand-in with this content for the length of the block. Several may use the same folder."""
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
            said = process.stdout.readline()
            if not said:
                raise HubFailed(f"the stand-in did not start:\n{(folder / 'log').read_text()}")
            ports = json.loads(said)
            with socket.create_connection(("127.0.0.1", ports["control"]), START_TIMEOUT) as control:
                started = Hub(ports["registry"], ports["cdn"], ports["auth"], process.pid, folder, control)
                yield started
                if errors := started._errors():
                    raise HubFailed("\n".join(errors))
        finally:
            process.kill()


def _json(switches: Switches) -> dict[str, Any]:
    return {**vars(switches)}
