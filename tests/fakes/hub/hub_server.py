"""The fake Hub's three ports for clients: the registry, the target of redirects (`cdn`), and the token service. Records
every request, and applies faults."""

from __future__ import annotations

import asyncio
import socket
import time
import traceback
from dataclasses import dataclass
from typing import Literal

from .hub_answers import HubAnswer, corrupted, error, page, shifted, text, without_length
from .hub_api import HubApi, HubTarget, target_of
from .hub_connection import ConnectionDropped, HubConnection, HubRequest, PeerGone
from .request_log import RecordedRequest
from .switches import Fault, Switches

Role = Literal["registry", "cdn", "auth"]
HOSTS: dict[Role, str] = {"registry": "127.0.0.1", "cdn": "127.0.0.1", "auth": "127.0.0.2"}
BACKLOG = 1024


@dataclass
class PendingFault:
    """A fault, the number of requests to skip before it applies (`skip`), and the number of requests to which it still
    applies (`left`; None: no limit)."""

    fault: Fault
    skip: int
    left: int | None

    def take(self, record: RecordedRequest, answer: HubAnswer) -> bool:
        """Returns whether the fault applies to this request. If so, counts one use."""
        fault = self.fault
        if self.left == 0 or fault.on not in ("any", record.kind) or fault.match not in record.path:
            return False
        if fault.method and fault.method != record.method:
            return False
        if fault.corrupt is not None and not (
            answer.status in (200, 206) and answer.start <= fault.corrupt < answer.stop
        ):
            return False
        if max(fault.drop_after or 0, fault.stall_after or 0) > answer.stop - answer.start:
            return False
        if self.skip:
            self.skip -= 1
            return False
        if self.left is not None:
            self.left -= 1
        return True


class HubServer:
    """Serves all three ports, and keeps the record of requests."""

    def __init__(self, registry: HubApi) -> None:
        self.registry = registry
        self.pending: list[PendingFault] = []
        self.records: list[RecordedRequest] = []
        self.errors: list[str] = []
        self.opened = 0
        """Number of connections accepted so far."""
        self._released = asyncio.Event()
        self._connections: dict[asyncio.Task[None], HubConnection] = {}
        self._reserved_ports: dict[Role, socket.socket] = {role: _bound(host, 0) for role, host in HOSTS.items()}
        self._listening: dict[asyncio.Task[None], socket.socket] = {}

    @property
    def switches(self) -> Switches:
        return self.registry.switches

    def url(self, role: Role) -> str:
        host, port = self._reserved_ports[role].getsockname()
        return f"http://{host}:{port}"

    @property
    def open(self) -> int:
        """The number of open connections."""
        return len(self._connections)

    def listen(self) -> None:
        """Accepts connections. The ports are the same after each `refuse`, so the URLs stay valid."""
        if self._listening:
            return
        for role, reserved in self._reserved_ports.items():
            listener = _bound(HOSTS[role], reserved.getsockname()[1])
            listener.listen(BACKLOG)
            self._listening[asyncio.ensure_future(self._accept(listener, role))] = listener

    async def refuse(self) -> None:
        """Refuses new connections from now on. Existing connections stay open."""
        for task, listener in self._listening.items():
            task.cancel()
            await asyncio.wait([task])
            listener.close()
        self._listening.clear()

    async def cut(self) -> None:
        """Resets every connection."""
        connections = dict(self._connections)
        for task in connections:
            task.cancel()
        if connections:
            await asyncio.wait(connections)

    def release(self) -> None:
        """Continues the responses that are stalled now. Responses that stall later wait for the next call."""
        self._released.set()
        self._released = asyncio.Event()

    async def _accept(self, listener: socket.socket, role: Role) -> None:
        loop = asyncio.get_running_loop()
        while True:
            sock, _ = await loop.sock_accept(listener)
            connection = HubConnection(sock, loop)
            task = asyncio.ensure_future(self._serve(connection, role))
            self._connections[task] = connection
            task.add_done_callback(lambda done: self._connections.pop(done))
            self.opened += 1

    async def _serve(self, connection: HubConnection, role: Role) -> None:
        reset = False
        try:
            while request := await connection.request():
                if not await self._serve_one(connection, role, request):
                    break
        except PeerGone:
            pass
        except ConnectionDropped as dropped:
            reset = dropped.reset
        except asyncio.CancelledError:
            reset = True
        except Exception:
            self.errors.append(traceback.format_exc())
        finally:
            connection.close(reset=reset)

    async def _serve_one(self, connection: HubConnection, role: Role, request: HubRequest) -> bool:
        """Answers one request and records it. Returns False if the connection must be closed."""
        target = target_of(request.path, redirects=self.switches.redirects)
        if role == "cdn":
            target = HubTarget("blob")
        headers = {name: value for name, value in request.headers.items() if name != "authorization"}
        authorization = "authorization" in request.headers
        record = RecordedRequest(target.kind, request.method, request.target, headers, authorization, time.monotonic())
        self.records.append(record)
        try:
            keep = await self._answer(connection, role, request, target, record)
        except PeerGone:
            record.end = "gone"
            raise
        except ConnectionDropped:
            record.end = "dropped"
            raise
        except asyncio.CancelledError:
            record.end = "cut"
            raise
        else:
            record.end = "whole"
            return keep
        finally:
            record.ended = time.monotonic()

    async def _answer(
        self, connection: HubConnection, role: Role, request: HubRequest, target: HubTarget, record: RecordedRequest
    ) -> bool:
        """Sends the response. Returns whether the connection stays open. Raises ConnectionDropped."""
        if self.switches.latency:
            await asyncio.sleep(self.switches.latency)
        if self.switches.send_buffer:
            connection.set_send_buffer(self.switches.send_buffer)
        answer, is_authorized = self._plan(role, request, target, record)
        fault = Fault()
        if is_authorized:
            fault = next((each.fault for each in self.pending if each.take(record, answer)), fault)
        if fault.stall:
            await connection.wait(self._released)
        if fault.hangup:
            raise ConnectionDropped(reset=fault.reset)
        answer = _faulty(answer, fault)
        close = not self.switches.keep_alive or request.headers.get("connection", "").lower() == "close"
        if not self.switches.lengths and answer.status in (200, 206) and target.kind in ("manifest", "blob"):
            answer, close = without_length(answer), True
        record.status = answer.status
        await connection.send(answer.head(close=close))
        if request.method != "HEAD":
            record.start, record.stop = answer.start, answer.stop
            await self._send(connection, answer, fault, record)
        return not close

    def _plan(
        self, role: Role, request: HubRequest, target: HubTarget, record: RecordedRequest
    ) -> tuple[HubAnswer, bool]:
        """Returns the response without faults, and whether the request was authorized."""
        if role == "cdn":
            # The path is /registry-v2/blobs/ALGORITHM/ENCODED/data. The added slashes make up for missing parts.
            _, _, _, algorithm, encoded, _ = (request.path + "//////").split("/", 5)
            answer = self.registry.stored(request, f"{algorithm}:{encoded}", record)
            return answer, answer.status < 400
        if target.kind == "token":
            return self.registry.token(request), True
        if role == "auth":
            return error(404, "no such page"), True
        realm = self.switches.realm or f"{self.url('registry')}/token"
        refused = self.registry.challenge(request, target, realm)
        if refused:
            return refused, False
        return self.registry.answer(request, target, record, self.url("cdn")), True

    async def _send(self, connection: HubConnection, answer: HubAnswer, fault: Fault, record: RecordedRequest) -> None:
        """Sends the body. If the fault requires it, stalls in the middle or closes the connection."""
        interruption_offsets = sorted(
            {answer.start + each for each in (fault.stall_after, fault.drop_after) if each is not None}
        )
        position = answer.start
        for stop in [*(each for each in interruption_offsets if each < answer.stop), answer.stop]:
            for piece in answer.body.pieces(position, stop):
                # Reads the rate again for every piece, because the test may change it during the response.
                await connection.send(piece, record, self.switches.rate)
            position = stop
            if position == answer.stop:
                break
            if fault.stall_after is not None and position == answer.start + fault.stall_after:
                await connection.wait(self._released)
            if fault.drop_after is not None and position == answer.start + fault.drop_after:
                await connection.wait_until_received()
                raise ConnectionDropped(reset=fault.reset)


def _faulty(answer: HubAnswer, fault: Fault) -> HubAnswer:
    """Returns the response to send in place of `answer`, with the status or the wrong bytes that the fault asks for."""
    if fault.status:
        headers = {"Retry-After": fault.retry_after} if fault.retry_after else {}
        if fault.status < 300:
            return text(fault.status, "", "text/plain", headers)
        if fault.page:
            return page(fault.status, "as the test wants it", headers)
        return error(fault.status, "as the test wants it", headers)
    if fault.shift:
        answer = shifted(answer, fault.shift)
    return answer if fault.corrupt is None else corrupted(answer, fault.corrupt)


def _bound(host: str, port: int) -> socket.socket:
    """Returns a socket that is bound to the port but does not listen, so that no other program gets the port. A second
    socket may be bound to the same port and listen."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((host, port))
    sock.setblocking(False)
    return sock
