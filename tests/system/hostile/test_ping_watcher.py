"""Tests that the ping watcher measures every kind of delay that a worker causes, and does not count a delay that a busy
machine causes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.server_process import ROOT, RegistryServer
from tests.system.hostile import attack_requests
from tests.system.hostile.ping_watcher import PingWatcher, Stall
from tests.system.hostile.stalls import MAX_STALL_MS

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
"""A program with an HTTP server that blocks its event loop, or does not, depending on the path of the request."""


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[RegistryServer]:
    """A process that runs the program WORKER."""
    with subprocess.Popen([sys.executable, "-c", WORKER], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            port = int(process.stdout.readline())
            yield RegistryServer(process, tmp_path, tmp_path / "log", url=f"http://127.0.0.1:{port}")
        finally:
            process.kill()


def _slowest_ping(worker: RegistryServer, path: str) -> Stall:
    """Returns the slowest ping during a request for this path. Checks that the request takes longer than the limit."""
    with PingWatcher(worker) as watcher:
        watcher.begin()
        with attack_requests.connect(worker.port) as sock:
            start = time.monotonic()
            sock.sendall(attack_requests.head("GET", path, keep=True))
            assert sock.recv(1000)
            assert 1000 * (time.monotonic() - start) > MAX_STALL_MS
        (stall,) = watcher.end()
        return stall


@pytest.mark.parametrize("path", ["/runs", "/blocks", "/lock"])
def test_blocked_event_loop_is_above_the_limit(worker: RegistryServer, path: str) -> None:
    """The measured delay is above the limit, at least once in three measurements, if Python code runs on the event loop
    for 80 ms, if a system call blocks the event loop for 80 ms, and if another thread does not release the interpreter
    lock."""
    assert any(_slowest_ping(worker, path).blocked_ms > MAX_STALL_MS for _ in range(3))


def test_thread_without_the_interpreter_lock_is_below_the_limit(worker: RegistryServer) -> None:
    """While a thread calculates for longer than the limit without the interpreter lock, the measured delay is below the
    limit, at least once in three measurements."""
    assert min(_slowest_ping(worker, "/thread").blocked_ms for _ in range(3)) < MAX_STALL_MS


def test_busy_machine_is_below_the_limit(worker: RegistryServer) -> None:
    """While four busy processes for each processor are running, the measured delay of the worker is below the limit, at
    least once in three measurements."""
    with contextlib.ExitStack() as stack:
        for _ in range(4 * (os.cpu_count() or 1)):
            busy = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            stack.callback(busy.kill)
        with PingWatcher(worker) as watcher:
            stalls = []
            for _ in range(3):
                watcher.begin()
                threading.Event().wait(0.5)
                stalls += watcher.end()
    assert min(stall.blocked_ms for stall in stalls) < MAX_STALL_MS, stalls
