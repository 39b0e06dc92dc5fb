"""Runs the loader wrk, which sends many small requests over keep-alive connections. wrk uses one thread, so it takes at
most one core."""

from __future__ import annotations

import signal
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bench.errors import TrialFailed
from bench.loaders.http_client import MANIFEST_ACCEPT
from bench.loaders.load_report import MARGIN_SECONDS, LoadReport, parse_report, run_loader
from bench.system.programs import clean_environment

LUA_SCRIPTS = Path(__file__).parent / "lua"
WRK_CONNECTIONS = 16
ENDLESS_SECONDS = 3600.0
"""The duration on wrk's command line if wrk sends requests while some other work runs. It is so long that wrk never
ends by itself: `run_wrk` stops wrk when the work has ended."""
DEFAULT_HEADERS = {"Accept": MANIFEST_ACCEPT}


def run_wrk(
    url: str,
    seconds: float = ENDLESS_SECONDS,
    *,
    size: int = 0,
    connections: int = WRK_CONNECTIONS,
    headers: Mapping[str, str] = DEFAULT_HEADERS,
    script: str | None = None,
    arguments: Sequence[str] = (),
    work: Callable[[], object] | None = None,
) -> LoadReport:
    """Requests `url` for `seconds` or, with `work`, for as long as `work` runs. `script`: the name of a Lua script that
    makes the requests, with its `arguments`. `size`: the expected size of each response body in bytes; 0: the size is
    not checked. Raises TrialFailed when a request failed, or when the responses have fewer than `size` bytes on
    average. Exceptions of `work` pass through."""
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as file:
        file.write("".join((LUA_SCRIPTS / f"{name}.lua").read_text() for name in ("report", script) if name))
        file.flush()
        command = ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", "20s", "--latency"]
        for name, value in headers.items():
            command += ["-H", f"{name}: {value}"]
        command += ["-s", file.name, url, "--", *arguments]
        return run_loader(command, seconds, size) if work is None else parse_report(_run_during(command, work), size)


def _run_during(command: Sequence[str], work: Callable[[], object]) -> str:
    """Runs wrk for as long as `work` runs, and returns wrk's output."""
    env, nothing, pipe = clean_environment(Path(tempfile.gettempdir())), subprocess.DEVNULL, subprocess.PIPE
    with subprocess.Popen(command, env=env, stdin=nothing, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            work()
            process.send_signal(signal.SIGINT)  # wrk stops and reports
            out, errors = process.communicate(timeout=MARGIN_SECONDS)
        except subprocess.TimeoutExpired:
            raise TrialFailed("wrk did not stop") from None
        finally:
            if process.poll() is None:
                process.kill()
    if process.returncode != 0:
        raise TrialFailed(f"wrk failed ({process.returncode}): {(errors or out).strip()[-300:]}")
    return out
