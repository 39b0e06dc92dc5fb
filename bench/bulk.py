"""Bulk transfers that go on while something else is measured."""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.curl import CURL, patched, patching
from bench.errors import TrialFailed
from bench.processes import end, environment, moved_bytes
from bench.servers import Server
from bench.wire import HOST, Client

RUNNING = 1 << 20
"""Bytes after which a transfer counts as under way."""
AGAIN = 500
PATIENCE = 20.0


class Pull:
    """A curl that fetches one address again and again."""

    def __init__(self, url: str, folder: Path) -> None:
        command = [*CURL, *(["-o", "/dev/null", url] * AGAIN)]
        self._process = start(command, folder)

    def moved(self) -> int:
        """Bytes so far. Raises TrialFailed when it has ended."""
        if self._process.poll() is not None:
            raise TrialFailed("a bulk pull ended before its time")
        return moved_bytes(self._process.pid)

    def stop(self) -> None:
        end(self._process)


class Push:
    """Uploads of one file, one after the other; each is cancelled at its end, so the disk does not fill."""

    def __init__(self, port: int, repo: str, file: Path, folder: Path) -> None:
        self._port, self._repo, self._file, self._folder = port, repo, file, folder
        self._size = file.stat().st_size
        self._whole = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = False
        self._lock = threading.Lock()
        self._failure: TrialFailed | None = None
        self._thread = threading.Thread(target=self._run, name="bulk push")
        self._thread.start()

    def moved(self) -> int:
        """Bytes so far. Raises TrialFailed when an upload has failed."""
        if self._failure:
            raise self._failure
        process = self._process
        return self._whole + (moved_bytes(process.pid) if process else 0)

    def stop(self) -> None:
        """Cuts the upload off; returns when its session is gone."""
        with self._lock:
            self._stopping = True
            if self._process:
                self._process.terminate()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._upload()
        except TrialFailed as error:
            self._failure = error

    def _upload(self) -> None:
        with Client(self._port) as client:
            where = client.start_upload(self._repo)
            with self._lock:
                if not self._stopping:
                    command = patching(f"http://{HOST}:{self._port}{where}", self._file)
                    self._process = start(command, self._folder, subprocess.PIPE)
            process = self._process
            out = process.communicate()[0].decode() if process else ""
            self._process = None
            with contextlib.suppress(TrialFailed) if self._stopping else contextlib.nullcontext():
                # A session that was cut off midway is the server's to clear away if it does not let us.
                client.ask("DELETE", patched(where, out) if out else where, expect=204)
            self._whole += self._size


def start(command: list[str], folder: Path, output: int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
    """Runs a program in a session of its own."""
    return subprocess.Popen(
        command,
        env=environment(folder),
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


@contextlib.contextmanager
def bulk(server: Server, repo: str, digest: str, pulls: int, file: Path) -> Iterator[Callable[[], int]]:
    """Keeps a server busy until the block ends: that many pulls of a blob, and a push of the file. The block begins
    once all of them move, and is given how many bytes they have moved so far. Raises TrialFailed when one does not."""
    folder = file.parent
    with contextlib.ExitStack() as stack:
        running: list[Pull | Push] = []
        for _ in range(pulls):
            running.append(Pull(f"{server.url}/v2/{repo}/blobs/{digest}", folder))
            stack.callback(running[-1].stop)
        running.append(Push(server.port, repo, file, folder))
        stack.callback(running[-1].stop)
        deadline = time.perf_counter() + PATIENCE
        while min(each.moved() for each in running) < RUNNING:
            if time.perf_counter() > deadline:
                raise TrialFailed("a bulk transfer does not move")
            time.sleep(0.05)
        yield lambda: sum(each.moved() for each in running)
