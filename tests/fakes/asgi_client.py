"""A small, strict ASGI client: it sends one request, returns one complete response, and checks every message."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from registry.asgi import Message, Receive, Scope, Send
from registry.http.answer_cache import CACHED_ANSWER_EXTENSION
from registry.http.response_headers import REQUEST_ID_NAME
from registry.server.connection.request_reports import RequestReports

ZERO_COPY = "http.response.zerocopysend"
Headers = dict[str, str] | Sequence[tuple[str, str]]


@dataclass
class AsgiAnswer:
    """A response. `whole`: whether the application has sent the last message of the response. `cut`: the exception that
    the application raised after it had sent the status; None: no exception."""

    status: int = 0
    fields: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""
    whole: bool = False
    cut: BaseException | None = None

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.fields if key == name.lower()]

    def __getitem__(self, name: str) -> str:
        (value,) = self.all(name)
        return value

    def __contains__(self, name: str) -> bool:
        return bool(self.all(name))

    @property
    def json(self) -> Any:
        assert self["content-type"].endswith("json")
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The error code. Checks that the body has exactly the format of the OCI spec."""
        document = self.json
        assert set(document) == {"errors"}
        (error,) = document["errors"]
        assert {"code", "message"} <= set(error) <= {"code", "message", "detail"}
        assert error["message"]
        code: str = error["code"]
        assert code.replace("_", "").isupper()
        return code


class AsgiConnection:
    """The client's end of a connection. It sends the `parts` of a body. With `leaves`, it then disconnects, but not
    before the event `after` is set. `sent`: the number of messages with bytes of the response body, and the number of
    those that named a part of a file."""

    def __init__(
        self, method: str, parts: Iterable[bytes], *, leaves: bool, after: asyncio.Event | None = None
    ) -> None:
        self.answer = AsgiAnswer()
        self._method = method
        self._parts = list(parts)
        self._leaves = leaves
        self._after = after
        self._ended = False
        self.sent = [0, 0]

    async def receive(self) -> Message:
        if self._parts:
            data = self._parts.pop(0)
            return {"type": "http.request", "body": data, "more_body": bool(self._parts) or self._leaves}
        if not self._ended and not self._leaves:
            self._ended = True
            return {"type": "http.request", "body": b"", "more_body": False}
        if not self._leaves:
            await asyncio.Event().wait()
        if self._after is not None:
            await self._after.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        answer = self.answer
        assert not answer.whole, "a message after the last one"
        if message["type"] == "http.response.start":
            assert not answer.status, "a second start"
            answer.status = message["status"]
            answer.fields = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in message["headers"]]
            assert all(name == name.lower() for name, _ in answer.fields)
            assert len(answer.all("content-length")) == (0 if answer.status in (204, 304) else 1)
        else:
            assert answer.status, "a body before the start"
            self.sent[0] += 1
            if message["type"] == ZERO_COPY:
                self.sent[1] += 1
                answer.body += os.pread(message["file"].fileno(), message["count"], message["offset"])
            else:
                assert message["type"] == "http.response.body"
                answer.body += message.get("body", b"")
            answer.whole = not message.get("more_body")


def scope_of(method: str, target: str | bytes, headers: Headers) -> Scope:
    raw, _, query = (target.encode("ascii") if isinstance(target, str) else target).partition(b"?")
    pairs = headers.items() if isinstance(headers, dict) else headers
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": raw.decode("latin-1"),
        "raw_path": raw,
        "query_string": query,
        "root_path": "",
        "headers": [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in pairs],
        "client": ("192.0.2.7", 40000),
        "server": ("127.0.0.1", 5000),
    }


class AsgiClient:
    """Sends requests to an ASGI application. `zero_copy`: tell the application that the server can send files. `sent`:
    the message counts of the last connection (see `AsgiConnection`)."""

    def __init__(self, app: Any, *, zero_copy: bool = False) -> None:
        self.app = app
        self.zero_copy = zero_copy
        self.sent = [0, 0]
        self.address = "192.0.2.7"

    async def __call__(
        self,
        method: str,
        target: str | bytes,
        headers: Headers | None = None,
        body: bytes | Sequence[bytes] = b"",
        *,
        leaves: bool = False,
        after: asyncio.Event | None = None,
    ) -> AsgiAnswer:
        """Sends a request and returns the response. `body`: bytes are sent with Content-Length, a list is sent in
        chunks. With `leaves`, the client disconnects after the body, and the response may be incomplete."""
        all_headers = list((headers or {}).items()) if isinstance(headers, dict) or headers is None else list(headers)
        names = {name.lower() for name, _ in all_headers}
        parts = [body] if isinstance(body, bytes) else list(body)
        if isinstance(body, bytes):
            if body and "content-length" not in names:
                all_headers.append(("content-length", str(len(body))))
        else:
            all_headers.append(("transfer-encoding", "chunked"))
        connection = AsgiConnection(method, [part for part in parts if part], leaves=leaves, after=after)
        scope = scope_of(method, target, all_headers)
        scope["client"] = (self.address, 40000)
        if self.zero_copy:
            scope["extensions"] = {ZERO_COPY: {}}
        await self._run(scope, connection)
        self.sent = connection.sent
        answer = connection.answer
        if answer.cut is None and not leaves:
            _check_whole(method, answer, is_management=scope["path"].startswith("/api/"))
        return answer

    async def _run(self, scope: Scope, connection: AsgiConnection) -> None:
        receive: Receive = connection.receive
        send: Send = connection.send
        try:
            await self.app(scope, receive, send)
        except Exception as error:
            assert connection.answer.status, "an error before anything was answered"
            connection.answer.cut = error


class CachedAnswerClient(AsgiClient):
    """Acts like our own server: looks for a cached response first, and calls the application only if there is none.
    Reports each cached response to the application. `ready`: whether the last response came from the cache."""

    def __init__(self, app: Any, *, zero_copy: bool = False) -> None:
        super().__init__(app, zero_copy=zero_copy)
        self.ready = False

    async def _run(self, scope: Scope, connection: AsgiConnection) -> None:
        scope.setdefault("extensions", {})[CACHED_ANSWER_EXTENSION] = {}
        found = self.app.answer_at_once(scope)
        self.ready = found is not None
        if found is None:
            await super()._run(scope, connection)
            return
        answer, request = found
        headers = [*answer.headers_before_id, (REQUEST_ID_NAME, request.encode()), *answer.headers_after_id]
        await connection.send({"type": "http.response.start", "status": 200, "headers": headers})
        await connection.send({"type": "http.response.body", "body": answer.body})
        RequestReports(self.app).report_cached(scope, answer, request)


def _check_whole(method: str, answer: AsgiAnswer, *, is_management: bool) -> None:
    assert answer.whole
    assert is_management or answer["docker-distribution-api-version"] == "registry/2.0"
    if answer.status in (204, 304) or method == "HEAD":
        assert not answer.body
    else:
        assert int(answer["content-length"]) == len(answer.body)
