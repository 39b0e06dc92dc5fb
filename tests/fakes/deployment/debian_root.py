"""Makes a minimal Debian system in a folder with debootstrap, and runs commands in it as on a separate machine.

A command has its own process tree and mounts. It shares the network and the kernel of this machine.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.fakes.deployment.debootstrap import make_debian
from tests.fakes.server_process import ROOT
from tests.fakes.temporary_files import memory_root

RELEASES = {"bookworm": "12", "trixie": "13"}
"""The number of each Debian release that Entrepot supports, by its name."""
CHECKOUT = "/srv/entrepot"
"""The folder in the Debian system into which `DebianRoot.copy_checkout` copies the files of the repository."""
CERTIFICATES = "/srv/certificates.crt"
"""The file in the Debian system with the certificates that pip on this machine trusts. It exists only if pip has the
setting `cert`; otherwise pip in the Debian system uses Debian's certificates."""

# The shell script mounts in a mount namespace of its own, so the machine does not see these mounts. The first mount
# makes the folder a mount point, because the runtime of a container can change its root only if that is a mount point.
_ENTER = """
mount --bind "$0" "$0"
mount -t proc proc "$0/proc"
mount --rbind /sys "$0/sys"
mount --rbind /dev "$0/dev"
mount -t tmpfs tmpfs "$0/run"
exec chroot "$0" /bin/sh -c "$1"
"""
_PIP_SETTINGS = ("index-url", "extra-index-url", "trusted-host", "proxy", "timeout", "cert")


@dataclass(frozen=True)
class DebianRoot:
    """A Debian system of the release `name` in `folder`."""

    name: str
    folder: Path

    def command(self, script: str) -> list[str]:
        """Returns the command that runs a shell script in the system. When the script ends, the kernel kills all
        processes that the script has started."""
        unshare = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private")
        return [*unshare, "sh", "-ec", _ENTER, str(self.folder), script]

    def environment(self) -> dict[str, str]:
        """Returns the environment of a command in the system. From the environment of this machine, it has only the
        settings with which pip reaches the package index."""
        basic = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
        pip = _pip_variables()
        certificates = {"PIP_CERT": CERTIFICATES} if "PIP_CERT" in pip else {}
        return {**basic, "LANG": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive", **pip, **certificates}

    def run(self, script: str, timeout: float = 600.0) -> str:
        """Runs a shell script in the system, and returns its output. Raises AssertionError if the exit code is not 0,
        and subprocess.TimeoutExpired after `timeout` seconds."""
        done = subprocess.run(
            self.command(script),
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0, f"in {self.name}: {script}\n{done.stdout[-8000:]}"
        return done.stdout

    def copy_checkout(self) -> None:
        """Copies the current files of the repository to CHECKOUT, also uncommitted ones. Leaves out files that git
        ignores."""
        target = self.folder / CHECKOUT.lstrip("/")
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        )
        for name in filter(None, listed.stdout.decode().split("\0")):
            if (ROOT / name).is_file():
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, target / name)

    def copy_in(self, file: Path, folder: str) -> None:
        """Copies a file of this machine into a folder of the system."""
        target = self.folder / folder.lstrip("/")
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, target / file.name)


@contextlib.contextmanager
def debian_root(name: str) -> Iterator[DebianRoot]:
    """Makes a minimal Debian system of the release `name` with Python and make. Removes it when the block ends. The
    system is in memory if there is enough space, so tests with the marker `real_disk` may fail in it."""
    folder = Path(tempfile.mkdtemp(prefix=f"entrepot-{name}-", dir=_fast_disk()))
    folder.chmod(0o755)  # apt downloads as the user `_apt`, who must be able to enter the folder
    try:
        make_debian(folder, name, ("python3", "make"))
        _set_up(folder)
        yield DebianRoot(name, folder)
    finally:
        shutil.rmtree(folder)


def _fast_disk() -> Path | None:
    """Returns a folder in memory; None (the usual folder for temporary files) if there is too little space, or if the
    file system in memory does not allow programs and devices."""
    root = memory_root()
    if root is None or os.statvfs(root).f_flag & (os.ST_NOEXEC | os.ST_NODEV):
        return None
    return root


def _set_up(folder: Path) -> None:
    """Copies this machine's DNS settings and pip's certificates into a new system. Makes dpkg fast: dpkg does not wait
    for the disk."""
    shutil.copy2("/etc/resolv.conf", folder / "etc" / "resolv.conf")
    (folder / "etc" / "dpkg" / "dpkg.cfg.d" / "fast").write_text("force-unsafe-io\n")
    if certificates := _pip_variables().get("PIP_CERT"):
        shutil.copyfile(certificates, folder / CERTIFICATES.lstrip("/"))


def _pip_variables() -> dict[str, str]:
    """Returns the settings with which pip on this machine reaches the package index, as environment variables. Leaves
    out settings that name a folder of this machine."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    found = {}
    for line in listed.stdout.splitlines():
        name, _, value = line.partition("=")
        name, value = name.rpartition(".")[2], value.strip("'")
        if name in _PIP_SETTINGS and "file:" not in value:
            found[f"PIP_{name.upper().replace('-', '_')}"] = value
    return found
