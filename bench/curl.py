"""curl: large blobs down and up, with little work of its own (a buffer of 100 KiB, output to /dev/null)."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench.errors import TrialFailed
from bench.processes import environment
from bench.wire import path_of

CURL = ("curl", "-q", "-sS", "--fail", "--noproxy", "*", "--max-time", "120")
LIMIT = 300.0


def pull(url: str, size: int, times: int, at_once: int = 1) -> float:
    """Fetches a blob of `size` bytes `times` over, by each of `at_once` programs; MiB/s of all together. Raises
    TrialFailed when a status or a size is wrong."""
    command = [*CURL, "-w", "%{http_code} %{size_download}\n"]
    for _ in range(times):
        command += ["-o", "/dev/null", url]
    begun = time.perf_counter()
    out = _all([command] * at_once)
    seconds = time.perf_counter() - begun
    for text in out:
        if text.split("\n")[:-1] != [f"200 {size}"] * times:
            raise TrialFailed(f"{times} times {size} bytes from {url} came as {text!r}")
    return size * times * at_once / seconds / (1 << 20)


def patch(url: str, file: Path) -> str:
    """Streams a file as docker does: one PATCH in chunked transfer coding. Gives path and query of the address that
    takes the rest. Raises TrialFailed unless it is taken."""
    (out,) = _all([patching(url, file)])
    return patched(url, out)


def patched(url: str, out: str) -> str:
    """Where an upload goes on, from what `patching` printed. Raises TrialFailed unless that was a 202."""
    code, _, address = out.partition(" ")
    if code != "202":
        raise TrialFailed(f"PATCH {url} gave {code or 'nothing'}")
    return path_of(address)


def patching(url: str, file: Path) -> list[str]:
    """The command of `patch`."""
    headers = ["Transfer-Encoding: chunked", "Content-Type: application/octet-stream", "Expect:"]
    said = [part for header in headers for part in ("-H", header)]
    said += ["-w", "%{http_code} %header{location}", "-o", "/dev/null"]
    return [*CURL, "-X", "PATCH", "-T", str(file), *said, url]


def _all(commands: Sequence[Sequence[str]]) -> list[str]:
    """Runs programs side by side, each to its end; what they printed. Raises TrialFailed."""
    env = environment(Path(tempfile.gettempdir()))
    running = [
        subprocess.Popen(
            one, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for one in commands
    ]
    try:
        done = [(process, *process.communicate(timeout=LIMIT)) for process in running]
    except subprocess.TimeoutExpired:
        raise TrialFailed(f"curl did not end within {LIMIT:.0f} s") from None
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
                process.wait()
    for process, _, complaint in done:
        if process.returncode != 0:
            raise TrialFailed(f"curl failed ({process.returncode}): {complaint.strip()[-300:]}")
    return [out for _, out, _ in done]
