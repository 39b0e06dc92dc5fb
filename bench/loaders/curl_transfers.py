"""Transfers large blobs with curl, which itself needs little CPU time. A trial either measures the transfers, or runs
them in the background while it measures other requests."""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.errors import TrialFailed
from bench.loaders.http_client import HttpClient, location_path
from bench.system.process_tree import io_bytes
from bench.system.programs import clean_environment, run_to_end, running_program
from bench.system.servers import RunningServer, local_url

CURL_COMMAND = ("curl", "-q", "-sS", "--fail", "--noproxy", "*", "--max-time", "120")
TRANSFER_TIMEOUT = 300.0  # seconds
MIN_STARTED_BYTES = 1 << 20
"""Bytes after which a background transfer counts as started."""
START_TIMEOUT = 20.0  # seconds
REPEATS = 500
"""How often one curl process of a background transfer downloads the blob: more often than a trial lasts."""


def download_blob(url: str, size: int, times: int, parallel: int = 1) -> float:
    """Runs `parallel` programs at the same time, each of which downloads a blob of `size` bytes `times` times. Returns
    their total rate in MiB/s. Raises TrialFailed on a wrong status or size."""
    command = [*CURL_COMMAND, "-w", "%{http_code} %{size_download}\n", *(["-o", "/dev/null", url] * times)]
    begun = time.perf_counter()
    with ThreadPoolExecutor(parallel) as threads:
        outputs = list(threads.map(lambda _: run_to_end(command, TRANSFER_TIMEOUT), range(parallel)))
    seconds = time.perf_counter() - begun
    for text in outputs:
        if text.split("\n")[:-1] != [f"200 {size}"] * times:
            raise TrialFailed(f"{times} times {size} bytes from {url} came as {text!r}")
    return size * times * parallel / seconds / (1 << 20)


def stream_upload(url: str, file: Path) -> str:
    """Streams a file as docker does, in one PATCH in chunked transfer coding. Returns path and query of the URL for the
    next request of the upload. Raises TrialFailed."""
    return next_upload_path(url, run_to_end(stream_upload_command(url, file), TRANSFER_TIMEOUT))


def next_upload_path(url: str, out: str) -> str:
    """Returns the next URL of an upload from the output of `stream_upload_command`. Raises TrialFailed unless the
    status was 202."""
    code, _, address = out.partition(" ")
    if code != "202":
        raise TrialFailed(f"PATCH {url} gave {code or 'nothing'}")
    return location_path(address)


def stream_upload_command(url: str, file: Path) -> list[str]:
    """Returns the curl command that `stream_upload` runs."""
    headers = ["Transfer-Encoding: chunked", "Content-Type: application/octet-stream", "Expect:"]
    options = [part for header in headers for part in ("-H", header)]
    options += ["-w", "%{http_code} %header{location}", "-o", "/dev/null"]
    return [*CURL_COMMAND, "-X", "PATCH", "-T", str(file), *options, url]


@contextlib.contextmanager
def _background_download(url: str, folder: Path) -> Iterator[Callable[[], int]]:
    """Downloads a URL again and again until the block ends. Gives the block a function that returns the number of bytes
    downloaded so far."""
    with running_program([*CURL_COMMAND, *(["-o", "/dev/null", url] * REPEATS)], folder / "curl.log") as process:

        def moved_bytes() -> int:
            if process.poll() is not None:
                raise TrialFailed("a background download ended too early")
            return io_bytes(process.pid)

        yield moved_bytes


class BackgroundUpload:
    """A thread that uploads a file again and again, and cancels each upload so that the disk does not fill."""

    def __init__(self, port: int, repo: str, file: Path) -> None:
        self._port, self._repo, self._file = port, repo, file
        self._finished_bytes = 0
        self._process: subprocess.Popen[str] | None = None
        self._stopping = False
        self._failure: TrialFailed | None = None
        self._thread = threading.Thread(target=self._run, name="background upload")
        self._thread.start()

    def moved_bytes(self) -> int:
        """Returns the number of bytes uploaded so far. Raises TrialFailed when an upload has failed."""
        if self._failure:
            raise self._failure
        process = self._process
        return self._finished_bytes + (io_bytes(process.pid) if process else 0)

    def stop(self) -> None:
        """Cancels the current upload and waits until its session is gone."""
        self._stopping = True
        if process := self._process:
            process.terminate()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._upload()
        except TrialFailed as error:
            if not self._stopping:  # the upload that stop() interrupts may fail, and its session remain on the server
                self._failure = error

    def _upload(self) -> None:
        """Uploads the file to a new session, and cancels the session. Raises TrialFailed."""
        with HttpClient(self._port) as client:
            location = client.start_upload(self._repo)
            self._process = subprocess.Popen(
                stream_upload_command(local_url(self._port) + location, self._file),
                env=clean_environment(self._file.parent),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            out = self._process.communicate()[0]
            self._process = None
            self._finished_bytes += self._file.stat().st_size
            # stop() may end curl before it prints the next URL of the session.
            client.request(
                "DELETE", location if self._stopping and not out else next_upload_path(location, out), expect=204
            )


@contextlib.contextmanager
def background_transfers(
    server: RunningServer, repo: str, digest: str, pulls: int, file: Path
) -> Iterator[Callable[[], int]]:
    """Downloads a blob with `pulls` programs and uploads a file, again and again, until the block ends. The block
    begins once all transfers have started. It gets a function that returns the number of bytes transferred so far.
    Raises TrialFailed."""
    with contextlib.ExitStack() as stack:
        url = f"{server.url}/v2/{repo}/blobs/{digest}"
        counters = [stack.enter_context(_background_download(url, file.parent)) for _ in range(pulls)]
        upload = BackgroundUpload(server.port, repo, file)
        stack.callback(upload.stop)
        counters.append(upload.moved_bytes)
        deadline = time.perf_counter() + START_TIMEOUT
        while min(count_bytes() for count_bytes in counters) < MIN_STARTED_BYTES:
            if time.perf_counter() > deadline:
                raise TrialFailed("a background transfer does not start")
            time.sleep(0.05)
        yield lambda: sum(count_bytes() for count_bytes in counters)
