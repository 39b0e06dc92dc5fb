"""Makes a minimal Debian in a folder with debootstrap, from the Debian mirror that this machine's apt uses."""

from __future__ import annotations

import platform
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
"""The keys that sign all releases of Debian."""
_TIMEOUT = 1200.0
"""Seconds after which debootstrap is killed. It usually takes one minute."""


def machine_release() -> str:
    """Returns the code name of the Debian release of this machine, such as `bookworm`."""
    return platform.freedesktop_os_release()["VERSION_CODENAME"]


def debian_mirror() -> str:
    """Returns the URL of the Debian mirror that this machine's apt uses. It has every release."""
    wanted = ("Identifier: Packages", "Component: main", f"Release: {machine_release()}")
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI)", *wanted]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]


def make_debian(folder: Path, release: str, packages: Sequence[str]) -> None:
    """Installs the smallest Debian system of `release`, with `packages` and their dependencies, into `folder`. The
    folder must be empty or missing, on a file system that allows device nodes and programs. Needs root.

    Packages that are installed in this system later do not start services. Raises AssertionError with the end of the
    output if debootstrap fails, and subprocess.TimeoutExpired if it takes too long.
    """
    command = [
        "debootstrap",
        "--variant=minbase",
        f"--include={','.join(packages)}",
        release,
        str(folder),
        debian_mirror(),
    ]
    with tempfile.TemporaryFile("w+") as output:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, timeout=_TIMEOUT, check=False
        )
        output.seek(0)
        assert done.returncode == 0, output.read()[-4000:]
    policy = folder / "usr" / "sbin" / "policy-rc.d"
    policy.write_text("#!/bin/sh\nexit 101\n")  # 101: Debian's code for "do not start the service"
    policy.chmod(0o755)
