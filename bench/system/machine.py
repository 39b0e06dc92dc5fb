"""Facts about the machine on which the bench runs: Debian packages, hardware, disk space, and the CPU time that the
host withholds from a virtual machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from bench.errors import BenchFailed
from bench.system.process_tree import CLOCK_TICKS, PROC
from bench.system.programs import PROGRAM_PATH, run_to_end

LOADER_PACKAGES = {"wrk": "wrk", "curl": "curl"}
"""The Debian package of each program. The package counts as installed if the program exists."""
DOCKER_REGISTRY_PACKAGES = {"docker-registry": "docker-registry"}
NGINX_PACKAGES = {"nginx": "nginx"}
DOCKER_PACKAGES = {"dockerd": "docker.io", "docker": "docker.io"}
INSTALL_TIMEOUT = 900.0  # seconds


def require_packages(wanted: Mapping[str, str]) -> None:
    """Installs missing packages if this process is root on Debian. Otherwise raises BenchFailed; its message has the
    command that installs them."""
    missing = sorted({package for name, package in wanted.items() if shutil.which(name, path=PROGRAM_PATH) is None})
    if not missing:
        return
    if os.geteuid() != 0 or shutil.which("apt-get", path=PROGRAM_PATH) is None:
        raise BenchFailed(
            f"these Debian packages are missing: {' '.join(missing)}; run: sudo apt-get update && "
            f"sudo apt-get install -y --no-install-recommends {' '.join(missing)}"
        )
    print(f"Installing {' '.join(missing)}", flush=True)
    # RUNLEVEL=1 keeps Debian from starting the servers that it installs.
    env = {**os.environ, "PATH": PROGRAM_PATH, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    run_to_end(["apt-get", "update", "-qq"], INSTALL_TIMEOUT, env=env)
    run_to_end(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing], INSTALL_TIMEOUT, env=env)


def package_version(package: str) -> str:
    """Returns the installed version of a Debian package; an empty string if it is not installed."""
    command = ["dpkg-query", "--show", "--showformat=${Version}", package]
    done = subprocess.run(command, env={"PATH": PROGRAM_PATH}, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def describe_machine(folder: Path) -> dict[str, object]:
    """Returns the facts about the machine that are stored with the results."""
    from storage.data_dir.check import file_system_type

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / (1 << 30), 1),
        "kernel": os.uname().release,
        "python": sys.version.split()[0],
        "file_system": file_system_type(folder),
    }


def check_space(folder: Path, needed: int) -> None:
    """Raises BenchFailed if the disk has fewer than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise BenchFailed(f"{folder.parent} has {free >> 30} GiB free, and {needed >> 30} are needed; see --folder")


def parse_steal_seconds(stat: str) -> float:
    """Returns, from the text of /proc/stat, the CPU seconds that the host withheld from this virtual machine, summed
    over all processors (proc(5): steal)."""
    return int(stat.split(maxsplit=9)[8]) / CLOCK_TICKS  # the eighth number after the word `cpu` is steal


def start_steal_meter() -> Callable[[], float]:
    """Starts a measurement. Returns a function that returns the percentage of CPU time that the host has withheld since
    the start."""
    stat = PROC / "stat"
    steal_before, begun = parse_steal_seconds(stat.read_text()), time.perf_counter()

    def percentage() -> float:
        cpu_seconds = (time.perf_counter() - begun) * (os.cpu_count() or 1)
        return 100 * (parse_steal_seconds(stat.read_text()) - steal_before) / cpu_seconds

    return percentage
