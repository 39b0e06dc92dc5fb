"""A program that runs the HTTP server with a small ASGI application, for the tests of this folder: `python -m
tests.system.server.echo_app '{"workers": 2}'`. Its argument has the options as JSON."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from ipaddress import ip_network
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

if os.environ.get("NO_UVLOOP"):  # as on a platform without a wheel of uvloop
    sys.modules["uvloop"] = None  # type: ignore[assignment]

from registry.server.gate.certificates import CertificateFiles, Certificates
from registry.server.gate.listener import ListenerOptions, ListenError, address_of, bind
from registry.server.gate.per_address_limit import PerAddressLimit
from registry.server.gate.trusted_proxies import TrustedProxies
from registry.server.process.live_change_options import LiveChangeOptions
from registry.server.process.run import serve
from registry.server.process.successor import Handover, Successor
from registry.server.server_limits import ServerLimits


class DiskFull(Exception):
    """An error that the server reports with its `message` instead of a traceback."""

    message = "the data directory\nis full"


class EchoApp:
    """An ASGI application. A request for `/NAME` calls the method NAME; any other path calls `echo`. Many methods print
    a line to stdout, for which the test waits. `start`: what goes wrong at the start, or an empty text."""

    def __init__(self, start: str) -> None:
        self.start = start

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.lifespan(receive, send)
            return
        query = {name: values[0] for name, values in parse_qs(scope["query_string"].decode()).items()}
        action = getattr(self, scope["raw_path"].decode().strip("/") or "echo", self.echo)
        await action(scope, receive, send, query)

    async def lifespan(self, receive: Any, send: Any) -> None:
        await receive()
        if self.start == "oserror":
            raise PermissionError(13, "Permission denied", "/data")
        if self.start == "message":
            raise DiskFull
        if self.start == "bug":
            raise ZeroDivisionError("a bug")
        if self.start == "marked":  # set by `mark_or`: the test has created its mark file
            raise PermissionError(13, "Permission denied", "/data")
        await send({"type": "lifespan.startup.complete"})
        await receive()
        print_line("closed")
        await send({"type": "lifespan.shutdown.complete"})

    async def echo(self, scope: Any, receive: Any, send: Any, query: dict[str, str]) -> None:
        """Receives the body. Answers with JSON that describes the request as the application got it."""
        size = 0
        has_more = True
        while has_more:
            message = await receive()
            if message["type"] == "http.disconnect":
                print_line(f"disconnected {size}")
                return
            size += len(message["body"])
            has_more = message["more_body"]
        description = {
            "method": scope["method"],
            "path": scope["path"],
            "raw_path": scope["raw_path"].decode(),
            "query": scope["query_string"].decode(),
            "host": [v.decode("latin-1") for n, v in scope["headers"] if n == b"host"],
            "names": [n.decode() for n, _ in scope["headers"]],
            "size": size,
            "pid": os.getpid(),
            "client": scope["client"][0],
            "scheme": scope["scheme"],
            "extensions": sorted(scope.get("extensions", {})),
        }
        await answer(send, 200, json.dumps(description).encode())

    async def digest(self, scope: Any, receive: Any, send: Any, query: dict[str, str]) -> None:
        """Receives the body, and answers with its digest and size. Receives it as views of the server's buffers, or as
        copies with the query `copied`. With `keep`, keeps all parts until the end. With `whole`, first tries to take
        the whole body with one call, which works only if the body has already arrived."""
        hasher, size, kept_parts, has_more = hashlib.sha256(), 0, [], True
        extension = scope.get("extensions", {}).get("entrepot.body", {})
        receive_views = extension.get("receive")
        whole = extension["take_whole"]() if "whole" in query else None
        if whole is not None:
            assert extension["take_whole"]() is None
            kept_parts, size, has_more = whole, sum(map(len, whole)), False
        elif "whole" in query:
            print_line("not whole")
        while has_more:
            if receive_views is None or "copied" in query:
                message = await receive()
                pieces, has_more = [message["body"]], message["more_body"]
            else:
                pieces, has_more = await receive_views()
            size += sum(map(len, pieces))
            kept_parts += pieces
            if "keep" not in query:
                hasher.update(b"".join(kept_parts))
                kept_parts.clear()
        hasher.update(b"".join(kept_parts))
        result: dict[str, object] = {"digest": hasher.hexdigest(), "size": size}
        if "whole" in query:
            result["whole"] = whole is not None
        await answer(send, 200, json.dumps(result).encode())

    async def refuse(self, scope: Any, receive: Any, send: Any, query: dict[str, str]) -> None:
        """Answers 403 without reading the body."""
        await answer(send, 403, b"no")

    async def slow(self, scope: Any, receive: Any, send: Any, query: dict[str, str]) -> None:
        """Answers after `seconds`, or when the file `until` exists."""
        print_line("slow")
        if "until" in query:
            while not os.path.exists(query["until"]):  # noqa: ASYNC110, ASYNC240 - the test only creates the file
                await asyncio.sleep(0.005)
        else:
            await asyncio.sleep(float(query["seconds"]))
        await answer(send, 200, b"slow")

    async def held(self, scope: Any, receive: Any, send: Any, query: dict[str, str]) -> None:
        """Blocks the event loop for ten minutes."""
        print_line("held")
        time.sleep(600)  # noqa: ASYNC251

    async def patient(self, scope: Any, receive: Any, send: Any, query: dict[str, str]) -> None:
        """Waits until the client disconnects, or until the server cancels the request because of that."""
        try:
            while (await receive())["type"] != "http.disconnect":
                print_line("patient")
        finally:
            print_line("left")

    async def big(self, scope: Any, receive: Any, send: Any, query: dict[str, str]) -> None:
        """Sends `size` zero bytes in pieces of 1 MiB. Prints `cut` if the client disconnects before the end."""
        size = int(query["size"])
        headers = [(b"content-length", str(size).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            while size:
                piece = bytes(min(size, 1 << 20))
                size -= len(piece)
                await send({"type": "http.response.body", "body": piece, "more_body": size > 0})
        except OSError:
            print_line("cut")
            raise

    async def whole(self, scope: Any, receive: Any, send: Any, query: dict[str, str]) -> None:
        """Sends the whole response in one message."""
        await answer(send, 200, body_of(query))

    async def stream(self, scope: Any, receive: Any, send: Any, query: dict[str, str]) -> None:
        """Sends a short body without a declared length, in two pieces."""
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ab", "more_body": True})
        await send({"type": "http.response.body", "body": b"cd", "more_body": False})

    async def file(self, scope: Any, receive: Any, send: Any, query: dict[str, str]) -> None:
        """Sends `parts` of a file, separated by commas. A part is `offset-count`, where both numbers are optional, or
        `=text` for text that is not from the file. `length`: the declared Content-Length."""
        assert scope["extensions"] == {"http.response.zerocopysend": {}}
        headers = [(b"content-length", query["length"].encode())] if "length" in query else []
        parts = query.get("parts", "-").split(",")
        with io.FileIO(query["path"]) as file:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            for number, part in enumerate(parts):
                more = {"more_body": number + 1 < len(parts)}
                try:
                    await send({**file_message(file, part), **more})
                except OSError as error:
                    print_line(f"cut {type(error).__name__}")
                    raise

    async def descriptors(self, scope: Any, receive: Any, send: Any, query: dict[str, str]) -> None:
        """Answers with the number of file descriptors that the process has open."""
        await answer(send, 200, str(len(os.listdir("/proc/self/fd"))).encode())

    async def frozen(self, scope: Any, receive: Any, send: Any, query: dict[str, str]) -> None:
        """Answers with the number of objects that Python's garbage collection skips (`gc.freeze`), and the number of
        collections of the second generation after which it makes a full collection."""
        await answer(send, 200, f"{gc.get_freeze_count()} {gc.get_threshold()[2]}".encode())

    async def unmodified(self, scope: Any, receive: Any, send: Any, query: dict[str, str]) -> None:
        """Answers 304 with a declared length and no body."""
        await send({"type": "http.response.start", "status": 304, "headers": [(b"content-length", b"100")]})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def fail(self, scope: Any, receive: Any, send: Any, query: dict[str, str]) -> None:
        """Raises before the response."""
        raise ZeroDivisionError("a bug")

    async def fail_late(self, scope: Any, receive: Any, send: Any, query: dict[str, str]) -> None:
        """Raises in the middle of the response."""
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"10")]})
        await send({"type": "http.response.body", "body": b"abc", "more_body": True})
        raise ZeroDivisionError("a bug")

    async def silent(self, scope: Any, receive: Any, send: Any, query: dict[str, str]) -> None:
        """Returns without a response."""
        return

    async def split(self, scope: Any, receive: Any, send: Any, query: dict[str, str]) -> None:
        """Tries to send a header value with a line break (response splitting)."""
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-name", b"a\r\nSet-Cookie: b")]})


@dataclass
class EchoCachedAnswer:
    """A response from the application's cache, as the server expects it: the body, and the headers before and after the
    request id that the server adds."""

    headers_before_id: list[tuple[bytes, bytes]]
    headers_after_id: list[tuple[bytes, bytes]]
    body: bytes
    rendered: Any = None


class CachedAnswerApp(EchoApp):
    """Also has a cached response for `/ready`, which the server can send without calling the application. The header
    `x-way` is `at once` for a cached response and `called` for one that the application sends. The body is the query's
    `text`, repeated `size` times."""

    cached_answer_count = 0
    """How many cached responses the server has requested."""

    def answer_at_once(self, scope: Any) -> tuple[EchoCachedAnswer, str] | None:
        if scope["raw_path"] != b"/ready":
            return None
        self.cached_answer_count += 1
        query = {name: values[0] for name, values in parse_qs(scope["query_string"].decode()).items()}
        body = body_of(query)
        after = [(b"content-length", str(len(body)).encode())]
        return EchoCachedAnswer(
            [(b"x-way", b"at once")], after, b"" if scope["method"] == "HEAD" else body
        ), f"{self.cached_answer_count:016x}"

    async def ready(self, scope: Any, receive: Any, send: Any, query: dict[str, str]) -> None:
        """Answers without the cache: the server calls this if it cannot use the cached response."""
        assert "entrepot.at_once" in scope["extensions"]
        await answer(send, 200, body_of(query), (b"x-way", b"called"))

    async def counted(self, scope: Any, receive: Any, send: Any, query: dict[str, str]) -> None:
        """Answers with the number of cached responses that the server has requested."""
        await answer(send, 200, str(self.cached_answer_count).encode())


def body_of(query: dict[str, str]) -> bytes:
    """Returns the query's `text`, repeated `size` times."""
    return query.get("text", "x").encode() * int(query.get("size", "1"))


def file_message(file: Any, part: str) -> dict[str, Any]:
    """Returns the ASGI message that sends this part (see `EchoApp.file`)."""
    if part.startswith("="):
        return {"type": "http.response.body", "body": part[1:].encode()}
    offset, _, count = part.partition("-")
    texts = {"offset": offset, "count": count}
    numbers = {name: int(text) for name, text in texts.items() if text}
    return {"type": "http.response.zerocopysend", "file": file, **numbers}


async def answer(send: Any, status: int, body: bytes, *more: tuple[bytes, bytes]) -> None:
    """Sends a whole response. `more`: headers besides Content-Length."""
    headers = [(b"content-length", str(len(body)).encode()), *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def print_line(text: str) -> None:
    os.write(1, f"{text}\n".encode())


def mark_or(start: str) -> str:
    """Returns `marked`, which makes the start fail, if the test has created its mark file. Otherwise returns
    `start`."""
    mark_file = os.environ.get("MARK")
    return "marked" if mark_file is not None and os.path.exists(mark_file) else start


class LateStop(Successor):
    """A new version of the program. SIGTERM arrives when the old version has left its loop to execute it."""

    def execute(self, handover: Handover, must_stop: Callable[[], bool]) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        super().execute(handover, must_stop)


def main() -> int:
    options = json.loads(sys.argv[1])
    successor = LateStop(options["successor"], {}) if "successor" in options else None
    try:
        sock = bind(options.get("listen", "127.0.0.1:0"))
    except ListenError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 1
    address = address_of(sock)
    return serve(
        lambda: (CachedAnswerApp if "at_once" in options else EchoApp)(mark_or(options.get("start", ""))),
        sockets=[sock],
        workers=options.get("workers", 1),
        shutdown_grace=options.get("grace", 5.0),
        limits=ServerLimits(**options.get("limits", {})),
        on_ready=lambda: print_line(f"ready {address}"),
        listener_options=listener_options_of(options),
        change_options=LiveChangeOptions(successor=successor),
    )


def listener_options_of(options: dict[str, Any]) -> ListenerOptions:
    """Returns the listener options from the JSON options. `tls`: the certificate, the key, and optionally the authority
    for client certificates and the kind of client authentication. `proxies`: the networks of trusted proxies.
    `connections`: the maximum number of connections per client address."""
    tls, workers = options.get("tls"), options.get("workers", 1)
    certificates = None
    if tls is not None:
        certificate, key, *client_options = tls
        files = CertificateFiles(Path(certificate), Path(key))
        if client_options:
            files = replace(files, client_ca=Path(client_options[0]), client_auth=client_options[1])
        certificates = Certificates(files)
    return ListenerOptions(
        certificates,
        TrustedProxies(map(ip_network, options["proxies"])) if "proxies" in options else None,
        PerAddressLimit(options["connections"], workers) if "connections" in options else None,
    )


if __name__ == "__main__":
    sys.exit(main())
