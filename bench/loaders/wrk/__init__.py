"""wrk: many small requests over kept connections, from one thread, so that it takes at most one core."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.errors import TrialFailed
from bench.system.process_tree import clean_environment

LUA_SCRIPTS = Path(__file__).parent
WRK_CONNECTIONS = 16
LOADER_MARGIN_SECONDS = 30.0
"""Seconds a loader may take beyond its time before it counts as hung."""
ENDLESS_SECONDS = 3600.0


@dataclass(frozen=True)
class LoadReport:
    """What a loader saw: only requests that were answered well count, and one that was not fails the trial."""

    requests: int
    seconds: float
    p50: float
    """Milliseconds, as p99."""
    p99: float

    @property
    def rate(self) -> float:
        return self.requests / self.seconds


def run_wrk(
    url: str,
    seconds: float,
    *,
    size: int = 0,
    connections: int = WRK_CONNECTIONS,
    headers: Mapping[str, str] | None = None,
    script: str | None = None,
    arguments: Sequence[str] = (),
) -> LoadReport:
    """Asks for `url`, or for what `script` makes of it, for that long. `size`: bytes of every body. Raises
    TrialFailed when a request failed or a body was short."""
    with _command(url, seconds, connections, headers, script, arguments) as command:
        out = run_loader(command, seconds + LOADER_MARGIN_SECONDS)
    return parse_report(out, size)


def run_wrk_during(
    work: Callable[[], None], url: str, *, size: int = 0, headers: Mapping[str, str] | None = None
) -> LoadReport:
    """Asks for `url` for as long as `work` takes. Raises TrialFailed as `run_wrk` does, and what `work` raises."""
    env, nothing, pipe = clean_environment(Path(tempfile.gettempdir())), subprocess.DEVNULL, subprocess.PIPE
    with (
        _command(url, ENDLESS_SECONDS, WRK_CONNECTIONS, headers, None, ()) as command,
        subprocess.Popen(command, env=env, stdin=nothing, stdout=pipe, stderr=pipe, text=True) as process,
    ):
        try:
            work()
            process.send_signal(signal.SIGINT)  # wrk stops and reports
            out, complaint = process.communicate(timeout=LOADER_MARGIN_SECONDS)
        except subprocess.TimeoutExpired:
            raise TrialFailed("wrk did not stop") from None
        finally:
            if process.poll() is None:
                process.kill()
    if process.returncode != 0:
        raise TrialFailed(f"wrk failed ({process.returncode}): {(complaint or out).strip()[-300:]}")
    return parse_report(out, size)


@contextlib.contextmanager
def _command(
    url: str,
    seconds: float,
    connections: int,
    headers: Mapping[str, str] | None,
    script: str | None,
    arguments: Sequence[str],
) -> Iterator[list[str]]:
    """The command of a load; its script is there until the block ends."""
    text = "".join((LUA_SCRIPTS / f"{name}.lua").read_text() for name in ("report", script) if name)
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as file:
        file.write(text)
        file.flush()
        command = ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", "20s"]
        for name, value in (headers or {}).items():
            command += ["-H", f"{name}: {value}"]
        yield [*command, "--latency", "-s", file.name, url, "--", *arguments]


def run_loader(command: Sequence[str], timeout: float) -> str:
    """Runs a loader to its end; what it printed. Raises TrialFailed."""
    home = Path(tempfile.gettempdir())
    try:
        done = subprocess.run(
            command,
            env=clean_environment(home),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        raise TrialFailed(f"{command[0]} did not end within {timeout:.0f} s") from None
    if done.returncode != 0:
        raise TrialFailed(f"{command[0]} failed ({done.returncode}): {(done.stderr or done.stdout).strip()[-300:]}")
    return done.stdout


def parse_report(out: str, size: int) -> LoadReport:
    """The figures in what a loader printed. Raises TrialFailed as `run_wrk` does."""
    lines = [line.removeprefix("BENCH ") for line in out.splitlines() if line.startswith("BENCH ")]
    if not lines:
        raise TrialFailed(f"the loader said nothing: {out[-300:]!r}")
    seen = json.loads(lines[-1])
    if seen["errors"] or not seen["requests"]:
        raise TrialFailed(f"{seen['errors']} of {seen['requests']} requests failed")
    if seen["bytes"] < size * seen["requests"]:
        raise TrialFailed(f"{seen['requests']} bodies of {size} bytes make more than {seen['bytes']} bytes")
    return LoadReport(seen["requests"], seen["microseconds"] / 1e6, seen["p50"] / 1e3, seen["p99"] / 1e3)
