"""The process of the fake Hub, and the socket through which a test controls it.

`hub.py` starts this process and writes its set-up to the first line of stdin. The process ends when stdin is closed, so
it never outlives the test.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .hub_api import HubApi
from .hub_content import HubContent
from .hub_server import HOSTS, HubServer, PendingFault
from .switches import Fault, Switches

CONTROL_LIMIT = 64 << 20  # bytes


class Control:
    """Carries out the calls of the test. A call is a line of JSON, `[name, arguments]`. The reply is a line of JSON."""

    def __init__(self, server: HubServer) -> None:
        self._server = server

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while line := await reader.readline():
                name, arguments = json.loads(line)
                try:
                    result: object = {"result": await self._do(name, arguments)}
                except Exception:
                    result = {"error": traceback.format_exc()}
                writer.write(json.dumps(result).encode() + b"\n")
                await writer.drain()
        writer.close()

    async def _do(self, name: str, arguments: dict[str, Any]) -> object:
        server = self._server
        if name in ("refuse", "cut"):
            await (server.refuse() if name == "refuse" else server.cut())
            return None
        simple: dict[str, Callable[..., object]] = {
            "set": self._set,
            "fault": self._fault,
            "clear": server.pending.clear,
            "release": server.release,
            "listen": server.listen,
            "records": lambda: [each.as_json() for each in server.records],
            "forget": server.records.clear,
            "put": server.registry.content.put,
            "tag": self._tag,
            "remove": self._remove,
            "revoke": server.registry.tokens.issued.clear,
            "state": self._state,
        }
        return simple[name](**arguments)

    def _set(self, **switches: Any) -> None:
        registry = self._server.registry
        registry.switches = replace(registry.switches, **switches)
        if "limit" in switches:
            registry.manifests_given = 0

    def _fault(self, fault: dict[str, Any]) -> None:
        new_fault = Fault(**fault)
        self._server.pending.append(PendingFault(new_fault, new_fault.skip, new_fault.times))

    def _tag(self, repo: str, tag: str, digest: str) -> None:
        self._server.registry.content.repositories[repo].tags[tag] = digest

    def _remove(self, repo: str, reference: str) -> None:
        """Removes a tag, a manifest with its tags, or a blob."""
        repository = self._server.registry.content.repositories[repo]
        repository.blobs.discard(reference)
        repository.manifests.pop(reference, None)
        repository.tags = {tag: digest for tag, digest in repository.tags.items() if reference not in (tag, digest)}

    def _state(self) -> dict[str, object]:
        server = self._server
        unused = sum(1 for each in server.pending if each.left != 0)
        return {"open": server.open, "opened": server.opened, "errors": server.errors, "faults": unused}


async def _run(setup: dict[str, Any]) -> None:
    content = HubContent()
    content.put(setup["content"])
    server = HubServer(HubApi(content, Switches.from_json(setup["switches"])))
    server.listen()
    control = await asyncio.start_server(Control(server).serve, "127.0.0.1", 0, limit=CONTROL_LIMIT)
    ports = {role: server.url(role) for role in HOSTS}
    print(json.dumps({**ports, "control": control.sockets[0].getsockname()[1]}), flush=True)
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()
    loop.add_reader(sys.stdin.fileno(), lambda: None if ended.done() else ended.set_result(None))
    await ended


if __name__ == "__main__":
    asyncio.run(_run(json.loads(sys.stdin.buffer.readline())))
