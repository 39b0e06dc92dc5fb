"""curl: large blobs down and up, with little work of its own (a buffer of 100 KiB, output to /dev/null).

Bulk transfers that go on while something else is measured.
"""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bench.errors import TrialFailed
from bench.loaders.http_client import HOST, HttpClient, location_path
from bench.system.process_tree import clean_environment, io_bytes, stop_program
from bench.system.servers import RunningServer

CURL_COMMAND = ("curl", "-q", "-sS", "--fail", "--noproxy", "*", "--max-time", "120")
TRANSFER_TIMEOUT = 300.0


def download_blob(url: str, size: int, times: int, at_once: int = 1) -> float:
    """Fetches a blob of `size` bytes `times` over, by each of `at_once` programs; MiB/s of all together. Raises
    TrialFailed when a status or a size is wrong."""
    command = [*CURL_COMMAND, "-w", "%{http_code} %{size_download}\n"]
    for _ in range(times):
        command += ["-o", "/dev/null", url]
    begun = time.perf_counter()
    out = _run_all([command] * at_once)
    seconds = time.perf_counter() - begun
    for text in out:
        if text.split("\n")[:-1] != [f"200 {size}"] * times:
            raise TrialFailed(f"{times} times {size} bytes from {url} came as {text!r}")
    return size * times * at_once / seconds / (1 << 20)


def stream_upload(url: str, file: Path) -> str:
    """Streams a file as docker does: one PATCH in chunked transfer coding. Gives path and query of the address that
    takes the rest. Raises TrialFailed unless it is taken."""
    (out,) = _run_all([stream_upload_command(url, file)])
    return next_upload_path(url, out)


def next_upload_path(url: str, out: str) -> str:
    """Where an upload goes on, from what `stream_upload_command` printed. Raises TrialFailed unless that was a 202."""
    code, _, address = out.partition(" ")
    if code != "202":
        raise TrialFailed(f"PATCH {url} gave {code or 'nothing'}")
    return location_path(address)


def stream_upload_command(url: str, file: Path) -> list[str]:
    """The command of `stream_upload`."""
    headers = ["Transfer-Encoding: chunked", "Content-Type: application/octet-stream", "Expect:"]
    said = [part for header in headers for part in ("-H", header)]
    said += ["-w", "%{http_code} %header{location}", "-o", "/dev/null"]
    return [*CURL_COMMAND, "-X", "PATCH", "-T", str(file), *said, url]


def _run_all(commands: Sequence[Sequence[str]]) -> list[str]:
    """Runs programs side by side, each to its end; what they printed. Raises TrialFailed."""
    env = clean_environment(Path(tempfile.gettempdir()))
    running = [
        subprocess.Popen(
            one, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for one in commands
    ]
    try:
        done = [(process, *process.communicate(timeout=TRANSFER_TIMEOUT)) for process in running]
    except subprocess.TimeoutExpired:
        raise TrialFailed(f"curl did not end within {TRANSFER_TIMEOUT:.0f} s") from None
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
                process.wait()
    for process, _, complaint in done:
        if process.returncode != 0:
            raise TrialFailed(f"curl failed ({process.returncode}): {complaint.strip()[-300:]}")
    return [out for _, out, _ in done]


STARTED_BYTES = 1 << 20
"""Bytes after which a transfer counts as under way."""
REPEATS = 500
STARTED_TIMEOUT = 20.0


class BackgroundDownload:
    """A curl that fetches one address again and again."""

    def __init__(self, url: str, folder: Path) -> None:
        command = [*CURL_COMMAND, *(["-o", "/dev/null", url] * REPEATS)]
        self._process = start_program(command, folder)

    def moved(self) -> int:
        """Bytes so far. Raises TrialFailed when it has ended."""
        if self._process.poll() is not None:
            raise TrialFailed("a bulk pull ended before its time")
        return io_bytes(self._process.pid)

    def stop(self) -> None:
        stop_program(self._process)


class BackgroundUpload:
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
        return self._whole + (io_bytes(process.pid) if process else 0)

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
        with HttpClient(self._port) as client:
            where = client.start_upload(self._repo)
            with self._lock:
                if not self._stopping:
                    command = stream_upload_command(f"http://{HOST}:{self._port}{where}", self._file)
                    self._process = start_program(command, self._folder, subprocess.PIPE)
            process = self._process
            out = process.communicate()[0].decode() if process else ""
            self._process = None
            with contextlib.suppress(TrialFailed) if self._stopping else contextlib.nullcontext():
                # A session that was cut off midway is the server's to clear away if it does not let us.
                client.ask("DELETE", next_upload_path(where, out) if out else where, expect=204)
            self._whole += self._size


def start_program(command: list[str], folder: Path, output: int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
    """Runs a program in a session of its own."""
    return subprocess.Popen(
        command,
        env=clean_environment(folder),
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


@contextlib.contextmanager
def background_transfers(
    server: RunningServer, repo: str, digest: str, pulls: int, file: Path
) -> Iterator[Callable[[], int]]:
    """Keeps a server busy until the block ends: that many pulls of a blob, and a push of the file. The block begins
    once all of them move, and is given how many bytes they have moved so far. Raises TrialFailed when one does not."""
    folder = file.parent
    with contextlib.ExitStack() as stack:
        running: list[BackgroundDownload | BackgroundUpload] = []
        for _ in range(pulls):
            running.append(BackgroundDownload(f"{server.url}/v2/{repo}/blobs/{digest}", folder))
            stack.callback(running[-1].stop)
        running.append(BackgroundUpload(server.port, repo, file, folder))
        stack.callback(running[-1].stop)
        deadline = time.perf_counter() + STARTED_TIMEOUT
        while min(each.moved() for each in running) < STARTED_BYTES:
            if time.perf_counter() > deadline:
                raise TrialFailed("a bulk transfer does not move")
            time.sleep(0.05)
        yield lambda: sum(each.moved() for each in running)
