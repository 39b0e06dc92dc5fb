"""A second process for tests of partial blobs. A partial blob is a blob that is still being downloaded from an
upstream. The process can write a partial blob, or wait for the bytes that another process writes.

It is run as `python -m tests.fakes.partial_peer DATA`. Each line of its stdin is a command in JSON, [name, …]. It
answers each command with one line. In the test, a `PartialPeer` sends the commands.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from storage.composition import open_registry
from storage.content import digest_of
from storage.errors import RegistryError
from storage.names import Digest, RepositoryName
from storage.partials import Partial
from storage.store.stored_registry import StoredRegistry
from tests.fakes.server_process import ROOT

UBUNTU = RepositoryName("docker.io/library/ubuntu")
BOOT = "one run of the machine"
TIMEOUT_SECONDS = 60.0


@cache
def content(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


@cache
def digest(seed: int, size: int) -> Digest:
    return digest_of(content(seed, size))


class PartialPeer:
    """Controls the second process: sends commands to it, and returns its answers."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def ask(self, *command: object) -> Any:
        """Sends a command. Returns its result, or the name of the error that it raised."""
        await self.start(*command)
        return await self.answer()

    async def start(self, *command: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command).encode() + b"\n")
        await self.process.stdin.drain()

    async def answer(self) -> Any:
        assert self.process.stdout is not None
        async with asyncio.timeout(TIMEOUT_SECONDS):
            line = await self.process.stdout.readline()
        assert line, "the other process has ended"
        return json.loads(line)

    async def kill(self) -> None:
        """Kills the process with SIGKILL."""
        self.process.kill()
        await self.process.wait()


@asynccontextmanager
async def partial_peer(data: Path) -> AsyncIterator[PartialPeer]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.fakes.partial_peer", str(data),
        cwd=ROOT, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        yield PartialPeer(process)
    except BaseException:
        with suppress(ProcessLookupError):
            process.kill()  # the process may be waiting for a step that the failed test will not do any more
        raise
    finally:
        assert process.stdin is not None
        process.stdin.close()
        await process.wait()


class _Actor:
    """Carries out the commands in the second process. A command that is not listed in `act` is the name of a method of
    `Partial`."""

    def __init__(self, registry: StoredRegistry, stack: AsyncExitStack) -> None:
        self._registry = registry
        self._stack = stack
        self._partial: Partial | None = None
        self._body = b""

    async def act(self, name: str, *arguments: Any) -> object:
        if name == "claim":
            self._body = content(*arguments)
            self._partial = await self._registry.partials.claim(digest(*arguments), arguments[1])
            return self._partial.is_owner
        if name in ("take", "slot", "try"):
            return await self._take(name, *arguments)
        if name == "leave":
            await self._stack.aclose()
            return None
        assert self._partial is not None
        match name:
            case "write":
                start, stop = arguments
                await asyncio.to_thread(self._partial.write_at, start, self._body[start:stop])
                return None
            case "wait":
                return await self._partial.wait(arguments[0])
            case "has_waiters":
                return self._partial.has_waiters
            case "take_ownership":
                return self._partial.take_ownership()
            case "missing":
                return self._partial.missing()
            case "commit":
                return (await self._partial.commit(UBUNTU)).size
            case _:
                return getattr(self._partial, name)(*arguments)

    async def _take(self, name: str, *arguments: Any) -> object:
        """Takes a lease or a slot, and keeps it until the command `leave`. Only `try` returns something: whether a slot
        was free."""
        leases = self._registry.leases
        if name == "take":
            await self._stack.enter_async_context(leases.take(*arguments))
            return None
        if name == "slot":
            await self._stack.enter_async_context(leases.slot(*arguments))
            return None
        return await self._stack.enter_async_context(leases.try_slot(*arguments))


async def _main(data: Path) -> None:
    async with open_registry(data, boot=BOOT) as registry, AsyncExitStack() as stack:
        actor = _Actor(registry, stack)
        while line := await asyncio.to_thread(sys.stdin.readline):
            try:
                answer = await actor.act(*json.loads(line))
            except RegistryError as error:
                answer = type(error).__name__
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    asyncio.run(_main(Path(sys.argv[1])))
