"""The watcher sees every kind of delay by a worker, and tells it from a delay by a busy machine."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.server_process import ROOT, RegistryServer
from tests.system.hostile import attack_requests
from tests.system.hostile.ping_watcher import PingWatcher, Stall
from tests.system.hostile.stalls import BOUND

pytestmark = pytest.mark.alone

WORKER = """
import asyncio, hashlib, json, os, threading, time

async def serve(reader, writer):
    while line := await reader.readline():
        while (await reader.readline()).strip():
            pass
        await HOW.get(line.split()[1].decode(), nothing)()
        writer.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: 0\\r\\n\\r\\n")

async def nothing(): pass

async def runs():
    until = time.thread_time() + SECONDS
    while time.thread_time() < until: pass

async def blocks(): time.sleep(SECONDS)

async def holds_the_lock():
    text = "[" + "[]," * 10_000_000 + "[]]"
    await asyncio.to_thread(json.loads, text)

async def works_in_a_thread(): await asyncio.to_thread(hashlib.sha256, bytes(512 << 20))

SECONDS = 0.08
HOW = {"/runs": runs, "/blocks": blocks, "/lock": holds_the_lock, "/thread": works_in_a_thread}

async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()

asyncio.run(main())
"""
"""Answers each path in a way that holds it, or does not."""


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[RegistryServer]:
    """A process with one event loop."""
    with subprocess.Popen([sys.executable, "-c", WORKER], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            port = int(process.stdout.readline())
            yield RegistryServer(process, tmp_path, tmp_path / "log", url=f"http://127.0.0.1:{port}")
        finally:
            process.kill()


def _seen(worker: RegistryServer, path: str) -> Stall:
    with PingWatcher(worker) as watcher:
        watcher.begin()
        with attack_requests.connect(worker.port) as sock:
            sock.sendall(attack_requests.head("GET", path, keep=True))
            sock.recv(1000)
        (stall,) = watcher.end()
        return stall


@pytest.mark.parametrize("path", ["/runs", "/blocks", "/lock"])
def test_what_holds_a_worker(worker: RegistryServer, path: str) -> None:
    """These are above the limit: Python on the event loop for 80 ms, a blocking call of this time, and a thread that
    does not release the interpreter lock."""
    assert any(_seen(worker, path).held > BOUND for _ in range(3))


def test_what_holds_none(worker: RegistryServer) -> None:
    """A long calculation in a thread that releases the interpreter lock is below the limit."""
    assert min(_seen(worker, "/thread").held for _ in range(3)) < BOUND


def test_a_busy_machine(worker: RegistryServer) -> None:
    """If four times as many processes as processors are busy, pings take longer, but the result is below the limit."""
    with contextlib.ExitStack() as stack:
        for _ in range(4 * (os.cpu_count() or 1)):
            busy = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            stack.callback(busy.kill)
        with PingWatcher(worker) as watcher:
            found = []
            for _ in range(3):
                watcher.begin()
                threading.Event().wait(0.5)
                found += watcher.end()
    assert min(stall.held for stall in found) < BOUND, found
