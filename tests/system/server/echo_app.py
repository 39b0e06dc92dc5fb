"""A small application to run the server with, as a process: `python -m tests.system.server.echo_app '{"workers":
2}'`."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import io
import json
import os
import sys
import time
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
from registry.server.process.run import serve
from registry.server.server_limits import ServerLimits


class DiskFull(Exception):
    message = "the data directory\nis full"


class EchoApp:
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
        if self.start == "marked":  # fails once the mark file exists
            raise PermissionError(13, "Permission denied", "/data")
        await send({"type": "lifespan.startup.complete"})
        await receive()
        print_line("closed")
        await send({"type": "lifespan.shutdown.complete"})

    async def echo(self, scope: Any, receive: Any, send: Any, query: dict[str, str]) -> None:
        size = 0
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                print_line(f"disconnected {size}")
                return
            size += len(message["body"])
            more = message["more_body"]
        seen = {
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
        await answer(send, 200, json.dumps(seen).encode())

    async def digest(self, scope: Any, receive: Any, send: Any, query: dict[str, str]) -> None:
        """Answers with the digest and size of the body, received without copies, or `copied`; `keep`: all parts are
        kept to the end; `whole`: taken at once, if it was received to its end."""
        running, size, kept, more = hashlib.sha256(), 0, [], True
        extension = scope.get("extensions", {}).get("entrepot.body", {})
        take = extension.get("receive")
        whole = extension["take_whole"]() if "whole" in query else None
        if whole is not None:
            assert extension["take_whole"]() is None
            kept, size, more = whole, sum(map(len, whole)), False
        elif "whole" in query:
            print_line("not whole")
        while more:
            if take is None or "copied" in query:
                message = await receive()
                pieces, more = [message["body"]], message["more_body"]
            else:
                pieces, more = await take()
            size += sum(map(len, pieces))
            kept += pieces
            if "keep" not in query:
                running.update(b"".join(kept))
                kept.clear()
        running.update(b"".join(kept))
        seen: dict[str, object] = {"digest": running.hexdigest(), "size": size}
        if "whole" in query:
            seen["whole"] = whole is not None
        await answer(send, 200, json.dumps(seen).encode())

    async def refuse(self, scope: Any, receive: Any, send: Any, query: dict[str, str]) -> None:
        await answer(send, 403, b"no")

    async def slow(self, scope: Any, receive: Any, send: Any, query: dict[str, str]) -> None:
        print_line("slow")
        await asyncio.sleep(float(query["seconds"]))
        await answer(send, 200, b"slow")

    async def held(self, scope: Any, receive: Any, send: Any, query: dict[str, str]) -> None:
        """Blocks the event loop."""
        print_line("held")
        time.sleep(600)  # noqa: ASYNC251

    async def patient(self, scope: Any, receive: Any, send: Any, query: dict[str, str]) -> None:
        """Waits until the client disconnects."""
        while (await receive())["type"] != "http.disconnect":
            print_line("patient")
        print_line("left")

    async def big(self, scope: Any, receive: Any, send: Any, query: dict[str, str]) -> None:
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
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ab", "more_body": True})
        await send({"type": "http.response.body", "body": b"cd", "more_body": False})

    async def file(self, scope: Any, receive: Any, send: Any, query: dict[str, str]) -> None:
        """Sends `parts` of a file, each `offset-count`, either left out, or `=text`. `length` declares a length."""
        assert scope["extensions"] == {"http.response.zerocopysend": {}}
        headers = [(b"content-length", query["length"].encode())] if "length" in query else []
        parts = query.get("parts", "-").split(",")
        with io.FileIO(query["path"]) as file:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            for place, part in enumerate(parts):
                more = {"more_body": place + 1 < len(parts)}
                try:
                    await send({**file_message(file, part), **more})
                except OSError as error:
                    print_line(f"cut {type(error).__name__}")
                    raise

    async def descriptors(self, scope: Any, receive: Any, send: Any, query: dict[str, str]) -> None:
        await answer(send, 200, str(len(os.listdir("/proc/self/fd"))).encode())

    async def frozen(self, scope: Any, receive: Any, send: Any, query: dict[str, str]) -> None:
        await answer(send, 200, str(gc.get_freeze_count()).encode())

    async def unmodified(self, scope: Any, receive: Any, send: Any, query: dict[str, str]) -> None:
        await send({"type": "http.response.start", "status": 304, "headers": [(b"content-length", b"100")]})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def fail(self, scope: Any, receive: Any, send: Any, query: dict[str, str]) -> None:
        raise ZeroDivisionError("a bug")

    async def fail_late(self, scope: Any, receive: Any, send: Any, query: dict[str, str]) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"10")]})
        await send({"type": "http.response.body", "body": b"abc", "more_body": True})
        raise ZeroDivisionError("a bug")

    async def silent(self, scope: Any, receive: Any, send: Any, query: dict[str, str]) -> None:
        return

    async def split(self, scope: Any, receive: Any, send: Any, query: dict[str, str]) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-name", b"a\r\nSet-Cookie: b")]})


@dataclass
class EchoCachedAnswer:
    """A response that the application has cached."""

    before: list[tuple[bytes, bytes]]
    after: list[tuple[bytes, bytes]]
    body: bytes
    rendered: Any = None


class CachedAnswerApp(EchoApp):
    """Has a cached response for `/ready`, if the server asks for it; the header `x-way` says how a response was made.
    The body is the query's `text`, `size` times."""

    given = 0

    def answer_at_once(self, scope: Any) -> tuple[EchoCachedAnswer, str] | None:
        if scope["raw_path"] != b"/ready":
            return None
        self.given += 1
        query = {name: values[0] for name, values in parse_qs(scope["query_string"].decode()).items()}
        body = body_of(query)
        after = [(b"content-length", str(len(body)).encode())]
        return EchoCachedAnswer(
            [(b"x-way", b"at once")], after, b"" if scope["method"] == "HEAD" else body
        ), f"{self.given:016x}"

    async def ready(self, scope: Any, receive: Any, send: Any, query: dict[str, str]) -> None:
        assert "entrepot.at_once" in scope["extensions"]
        await answer(send, 200, body_of(query), (b"x-way", b"called"))

    async def counted(self, scope: Any, receive: Any, send: Any, query: dict[str, str]) -> None:
        await answer(send, 200, str(self.given).encode())


def body_of(query: dict[str, str]) -> bytes:
    return query.get("text", "x").encode() * int(query.get("size", "1"))


def file_message(file: Any, part: str) -> dict[str, Any]:
    if part.startswith("="):
        return {"type": "http.response.body", "body": part[1:].encode()}
    offset, _, count = part.partition("-")
    named = {"offset": offset, "count": count}
    numbers = {name: int(text) for name, text in named.items() if text}
    return {"type": "http.response.zerocopysend", "file": file, **numbers}


async def answer(send: Any, status: int, body: bytes, *more: tuple[bytes, bytes]) -> None:
    headers = [(b"content-length", str(len(body)).encode()), *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def print_line(text: str) -> None:
    os.write(1, f"{text}\n".encode())


def mark_or(start: str) -> str:
    """Returns `marked` once the test has created its mark file, else what the test asked for."""
    mark = os.environ.get("MARK")
    return "marked" if mark is not None and os.path.exists(mark) else start


def main() -> int:
    options = json.loads(sys.argv[1])
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
    )


def listener_options_of(options: dict[str, Any]) -> ListenerOptions:
    """Reads `tls`: certificate, key, and perhaps the authority for clients and the kind of client authentication;
    `proxies`: networks; `connections`: the limit of an address."""
    tls, workers = options.get("tls"), options.get("workers", 1)
    certificates = None
    if tls is not None:
        certificate, key, *more = tls
        files = CertificateFiles(Path(certificate), Path(key))
        if more:
            files = replace(files, client_ca=Path(more[0]), client_auth=more[1])
        certificates = Certificates(files)
    return ListenerOptions(
        certificates,
        TrustedProxies(map(ip_network, options["proxies"])) if "proxies" in options else None,
        PerAddressLimit(options["connections"], workers) if "connections" in options else None,
    )


if __name__ == "__main__":
    sys.exit(main())
