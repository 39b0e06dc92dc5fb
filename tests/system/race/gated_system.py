"""Tools for race tests. A `GatedSystem` makes the file system calls of a registry, and can stop before one of them, the
gate, until the test opens the gate. A peer is a second registry with the same data directory."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

from storage.composition import open_registry
from storage.content import OCI_MANIFEST, Actor, Manifest, digest_of
from storage.data_dir.system import System
from storage.errors import RegistryError
from storage.names import Digest, RepositoryName, Tag
from storage.patterns import ALL_NAMES
from storage.store.stored_registry import StoredRegistry
from tests.fakes.server_process import ROOT
from tests.system.race.content_kinds import KINDS, ContentKind

BY = Actor(name="tester")
TIMEOUT_SECONDS = 60.0
BOOT = "one run of the machine"
"""The boot id that all registries of a test see by default."""


class StepGate:
    """Stops the first call of the step `name` whose path contains `where`, until the test opens the gate."""

    def __init__(self, name: str, where: str) -> None:
        self.name = name
        self.where = where
        self._reached = threading.Event()
        self._open = threading.Event()

    async def reached(self) -> None:
        """Waits until a call has stopped at the gate."""
        assert await asyncio.to_thread(self._reached.wait, TIMEOUT_SECONDS), f"nobody came to {self.name} {self.where}"

    def open(self) -> None:
        self._open.set()

    def enter(self, name: str, where: str) -> None:
        """Called before each step. The first call that matches the gate waits here until the gate is open."""
        if name == self.name and self.where in where and not self._reached.is_set():
            self._reached.set()
            assert self._open.wait(TIMEOUT_SECONDS), "the test left the gate shut"


class GatedSystem(System):
    """A System that waits before the step that its gate matches. At a write, it waits after half of the first chunk is
    written."""

    def __init__(self) -> None:
        super().__init__()
        self.gate: StepGate | None = None
        self.written = 0
        """The number of bytes written so far."""

    def stop_at(self, name: str, where: str = "") -> StepGate:
        """Sets the gate to this step, and returns it."""
        self.gate = StepGate(name, where)
        return self.gate

    def enter(self, name: str, where: str = "") -> None:
        """Waits at the gate if this is its step."""
        if self.gate is not None:
            self.gate.enter(name, where)

    def write(self, fd: int, chunks: Sequence[bytes | memoryview], offset: int) -> int:
        half = len(chunks[0]) // 2
        if self.gate is None or half == 0:
            written = super().write(fd, chunks, offset)
        else:
            written = super().write(fd, [chunks[0][:half]], offset)
            self.enter("write")
        self.written += written
        return written

    def sync(self, fd: int) -> None:
        self.enter("sync", os.readlink(f"/proc/self/fd/{fd}"))
        super().sync(fd)

    def rename(self, source: Path, target: Path) -> None:
        self.enter("rename", f"{source} {target}")
        super().rename(source, target)

    def commit(self, commit: Callable[[], None], *, durable: bool) -> None:
        self.enter("commit")
        super().commit(commit, durable=durable)


def manifest_of(config: bytes) -> Manifest:
    """Returns an image manifest with this config and without layers."""
    part = {"mediaType": "application/json", "digest": digest_of(config), "size": len(config)}
    document = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": part, "layers": []}
    return Manifest.parse(json.dumps(document).encode(), OCI_MANIFEST)


async def push(registry: StoredRegistry, repo: RepositoryName, body: bytes) -> None:
    """Pushes a blob."""
    writer = await registry.start_upload(repo)
    try:
        await writer.write(body)
        await writer.commit(digest_of(body))
    finally:
        await writer.aclose()


async def pull(registry: StoredRegistry, repo: RepositoryName, digest: Digest) -> bytes:
    """Pulls a blob. Raises BlobUnknown if the repository does not have it."""
    reader = await registry.open_blob(repo, digest)
    try:
        return b"".join([chunk async for chunk in reader])
    finally:
        await reader.aclose()


async def act(registry: StoredRegistry, action: str, repo: str, body: bytes) -> None:
    """Runs one action. `push`, `delete` and `mount` (from any repository) concern the blob `body`. `manifest` puts a
    manifest that refers to the blob. `collect` runs the garbage collector once. `sweep` runs it until it has checked
    all stored blobs."""
    name = RepositoryName(repo)
    match action:
        case "push":
            await push(registry, name, body)
        case "delete":
            await registry.delete_blob(name, digest_of(body), by=BY)
        case "mount":
            await registry.mount_blob(name, digest_of(body), ALL_NAMES, BY)
        case "manifest":
            await registry.put_manifest(name, manifest_of(body), [Tag("latest")], by=BY)
        case "collect":
            await registry.collector.collect()
        case "sweep":
            for _ in range(33):  # each run checks one shard of the stored blobs, so this covers all shards
                await registry.collector.collect()


class PeerRegistry(Protocol):
    """A second registry with the same data directory, whose action can be stopped at a gate."""

    async def start(self, action: str, repo: str, body: bytes, gate: tuple[str, str]) -> None:
        """Starts the action of `act`. Returns when it has stopped at the gate."""
        ...

    async def finish(self) -> str | None:
        """Opens the gate, and waits until the action has ended. Returns the code of its error, or None for success."""
        ...


class PeerInProcess:
    """Another registry in this process."""

    def __init__(self, registry: StoredRegistry, system: GatedSystem) -> None:
        self._registry = registry
        self._system = system

    async def start(self, action: str, repo: str, body: bytes, gate: tuple[str, str]) -> None:
        self._gate = self._system.stop_at(*gate)
        self._task = asyncio.create_task(_run_action(self._registry, action, repo, body))
        await self._gate.reached()

    async def finish(self) -> str | None:
        self._gate.open()
        return await self._task


class PeerProcess:
    """A registry in a process of its own (this module, run as a program)."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def start(self, action: str, repo: str, body: bytes, gate: tuple[str, str]) -> None:
        await self._send([action, repo, body.hex(), *gate])
        assert await self._line() == "reached"

    async def finish(self) -> str | None:
        await self._send("open")
        answer = await self._line()
        assert answer is None or isinstance(answer, str)
        return answer

    async def _send(self, message: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message).encode() + b"\n")
        await self._process.stdin.drain()

    async def _line(self) -> Any:
        assert self._process.stdout is not None
        async with asyncio.timeout(TIMEOUT_SECONDS):
            line = await self._process.stdout.readline()
        assert line, "the other process has ended"
        return json.loads(line)


async def _run_action(registry: StoredRegistry, action: str, repo: str, body: bytes) -> str | None:
    """Runs the action. Returns the code of its error, or None for success."""
    try:
        await act(registry, action, repo, body)
    except RegistryError as error:
        return error.code
    return None


def open_gated(
    data: Path, kind: ContentKind, system: GatedSystem, clock: Callable[[], float], boot: str = BOOT
) -> AbstractAsyncContextManager[StoredRegistry]:
    """Opens a registry that can be stopped at each of its steps."""
    content = kind.opener(data, system.enter)
    return open_registry(data, grace=0, system=system, boot=boot, clock=clock, open_content=content)


@asynccontextmanager
async def peer_in_process(data: Path, kind: ContentKind, clock: Callable[[], float]) -> AsyncIterator[PeerRegistry]:
    system = GatedSystem()
    async with open_gated(data, kind, system, clock) as registry:
        yield PeerInProcess(registry, system)


@asynccontextmanager
async def peer_process(data: Path, kind: ContentKind, clock: Callable[[], float]) -> AsyncIterator[PeerRegistry]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.system.race.gated_system", str(data), kind.name, str(clock() + 60),
        cwd=ROOT, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=1 << 26,
    )  # fmt: skip
    try:
        yield PeerProcess(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        await process.wait()


async def _main(data: Path, kind: ContentKind, now: float) -> None:
    """Runs the actions that come as JSON lines on stdin, and prints when each has reached its gate and has ended."""
    system = GatedSystem()
    async with open_gated(data, kind, system, lambda: now) as registry:
        while line := await asyncio.to_thread(sys.stdin.readline):
            action, repo, body, *where = json.loads(line)
            gate = system.stop_at(*where)
            task = asyncio.create_task(_run_action(registry, action, repo, bytes.fromhex(body)))
            await gate.reached()
            print(json.dumps("reached"), flush=True)
            await asyncio.to_thread(sys.stdin.readline)
            gate.open()
            print(json.dumps(await task), flush=True)


if __name__ == "__main__":
    asyncio.run(_main(Path(sys.argv[1]), KINDS[sys.argv[2]], float(sys.argv[3])))
