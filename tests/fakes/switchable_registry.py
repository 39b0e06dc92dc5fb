"""Runs a docker-registry that a test can switch off and on again.

with switchable_registry(tmp_path, content) as far:
    with far.off():
        ...                                # the port of the registry refuses connections
    far.add("library/app", tree, "2")      # pushes an image to the running registry
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
    """A docker-registry with a fixed address. Whenever it is switched on, `content` is pushed to it."""

    def __init__(self, folder: Path, content: UpstreamContent) -> None:
        self.content = content
        self._folder = folder
        # This socket is bound to the port but does not listen. So no other program gets the port while the registry is
        # off.
        self._reserved_port = socket.socket()
        self._reserved_port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._reserved_port.bind(("127.0.0.1", 0))
        self._logs: list[Path] = []
        self._running = contextlib.ExitStack()

    @property
    def address(self) -> str:
        """`host:port`."""
        host, port = self._reserved_port.getsockname()
        return f"{host}:{port}"

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    def add(self, repo: str, tree: ImageTree, *tags: str) -> ImageTree:
        """Pushes an image tree to the running registry, as `UpstreamContent.add` does, and returns the tree."""
        self.content.add(repo, tree, *tags)
        added = UpstreamContent()
        added.add(repo, tree, *tags)
        push(self.address, added)
        return tree

    def read(self) -> Counter[str]:
        """Returns how often each GET or HEAD request was answered, by texts such as `GET /v2/app/tags/list`."""
        return Counter(READ.findall("".join(log.read_text() for log in self._logs)))

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Kills the registry, and starts it again when the block ends."""
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
        self._reserved_port.close()


@contextlib.contextmanager
def switchable_registry(tmp_path: Path, content: UpstreamContent) -> Iterator[SwitchableRegistry]:
    """Runs the registry until the block ends."""
    with contextlib.closing(SwitchableRegistry(tmp_path, content)) as registry:
        registry._start()
        yield registry
