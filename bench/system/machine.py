"""The Debian packages a measurement needs: there, or installed now."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping

from bench.errors import BenchFailed
from bench.system.process_tree import PROGRAM_PATH

LOADER_PACKAGES = {"wrk": "wrk", "curl": "curl"}
"""Package by the program that shows it is there."""
DOCKER_REGISTRY_PACKAGES = {"docker-registry": "docker-registry"}
NGINX_PACKAGES = {"nginx": "nginx"}
DOCKER_PACKAGES = {"dockerd": "docker.io", "docker": "docker.io"}


def require_packages(wanted: Mapping[str, str]) -> None:
    """Installs what is missing, as root on a Debian. Raises BenchFailed with the command to run otherwise."""
    missing = sorted({package for name, package in wanted.items() if shutil.which(name, path=PROGRAM_PATH) is None})
    if not missing:
        return
    if os.geteuid() != 0 or shutil.which("apt-get", path=PROGRAM_PATH) is None:
        raise BenchFailed(
            f"these Debian packages are missing: {' '.join(missing)}; run: sudo apt-get update && "
            f"sudo apt-get install -y --no-install-recommends {' '.join(missing)}"
        )
    print(f"Installing {' '.join(missing)}", flush=True)
    # With run level 1, Debian does not start the servers it installs: ours are the only ones that count.
    env = {**os.environ, "PATH": PROGRAM_PATH, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    for command in (
        ["apt-get", "update", "-qq"],
        ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing],
    ):
        done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode != 0:
            raise BenchFailed(f"{' '.join(command)} failed: {(done.stderr or done.stdout).strip()[-300:]}")


def package_version(package: str) -> str:
    """The installed version of a Debian package; empty where there is none."""
    command = ["dpkg-query", "--show", "--showformat=${Version}", package]
    done = subprocess.run(command, env={"PATH": PROGRAM_PATH}, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""
