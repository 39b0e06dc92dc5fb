"""A docker-registry that can be switched off and on again.

with switched(tmp_path, content) as far:
    with far.off():
        ...                                # its port refuses connections
    far.add("library/app", holding, "2")   # pushed to it while it runs
"""

from __future__ import annotations

import contextlib
import re
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from .real_upstreams import docker_registry, push
from .upstream_content import ImageTree, UpstreamContent

READ = re.compile(r'"((?:GET|HEAD) /v2/[^\s?]+)\S* HTTP/1\.1" \d')


class SwitchableRegistry:
    """A docker-registry that keeps its address. Each time it is switched on, it has all of `content`."""

    def __init__(self, folder: Path, content: UpstreamContent) -> None:
        self.content = content
        self._folder = folder
        # Bound, but not listened on, the port is the registry's alone, also while it is off.
        self._held = socket.socket()
        self._held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._held.bind(("127.0.0.1", 0))
        self._logs: list[Path] = []
        self._running = contextlib.ExitStack()

    @property
    def address(self) -> str:
        """`host:port`."""
        host, port = self._held.getsockname()
        return f"{host}:{port}"

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    def add(self, repo: str, holding: ImageTree, *tags: str) -> ImageTree:
        """Pushes an image tree to the running registry, as `UpstreamContent.add` does, and returns the tree."""
        self.content.add(repo, holding, *tags)
        added = UpstreamContent()
        added.add(repo, holding, *tags)
        push(self.address, added)
        return holding

    def read(self) -> Counter[str]:
        """Returns the requests that were answered, such as `GET /v2/app/tags/list`, with their numbers."""
        return Counter(READ.findall("".join(log.read_text() for log in self._logs)))

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Kills the registry, and starts it again at the end of the block."""
        self._stop()
        try:
            yield
        finally:
            self._start()

    def _start(self) -> None:
        started = self._running.enter_context(docker_registry(self._folder, self.content, listen=self.address))
        self._logs.append(started.log)

    def _stop(self) -> None:
        self._running.close()

    def close(self) -> None:
        self._stop()
        self._held.close()


@contextlib.contextmanager
def switchable_registry(tmp_path: Path, content: UpstreamContent) -> Iterator[SwitchableRegistry]:
    """Runs the registry until the block ends."""
    with contextlib.closing(SwitchableRegistry(tmp_path, content)) as far:
        far._start()
        yield far
