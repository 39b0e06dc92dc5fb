"""A plain Debian in a folder, made by debootstrap, and commands that run in it as on a machine of its own.

What runs there has its own processes and mounts, and this machine's network and kernel.
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
"""The name and the number of each Debian that Entrepot supports."""
CHECKOUT = "/srv/entrepot"
"""Where `DebianRoot.copy_checkout` puts the files of the repository."""
CERTIFICATES = "/srv/certificates.crt"
"""Where a copy of the certificates is that pip on this machine trusts, if it was told which. Debian has its own."""

# All in a mount namespace of its own, of which the machine sees nothing. A container's runtime can change the root only
# if that is a mount point.
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
    """A Debian of the release `name` in `folder`."""

    name: str
    folder: Path

    def command(self, script: str) -> list[str]:
        """The words that run a shell script in it. Everything that the script started ends with it."""
        unshare = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private")
        return [*unshare, "sh", "-ec", _ENTER, str(self.folder), script]

    def environment(self) -> dict[str, str]:
        """What a command in it gets: the way to the package index as pip on this machine has it, and nothing else."""
        plain = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
        pip = _pip_variables()
        certificates = {"PIP_CERT": CERTIFICATES} if "PIP_CERT" in pip else {}
        return {**plain, "LANG": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive", **pip, **certificates}

    def run(self, script: str, timeout: float = 600.0) -> str:
        """Runs a shell script, which has to end with 0 within `timeout` seconds, and returns its output."""
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
        """Copies the repository's files, as they are now, to `CHECKOUT`."""
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
        """Copies a file of this machine into a folder of the Debian."""
        target = self.folder / folder.lstrip("/")
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, target / file.name)


@contextlib.contextmanager
def debian_root(name: str) -> Iterator[DebianRoot]:
    """A minimal Debian of the release `name` with Python and make, until the block ends. It lies in memory if there is
    room, so tests with the marker `real_disk` may fail in it."""
    folder = Path(tempfile.mkdtemp(prefix=f"entrepot-{name}-", dir=_fast_disk()))
    folder.chmod(0o755)  # apt downloads as a user of its own
    try:
        make_debian(folder, name, ("python3", "make"))
        _set_up(folder)
        yield DebianRoot(name, folder)
    finally:
        shutil.rmtree(folder)


def _fast_disk() -> Path | None:
    """Memory, if there is room and programs and devices work there; None: the folder for temporary files."""
    root = memory_root()
    if root is None or os.statvfs(root).f_flag & (os.ST_NOEXEC | os.ST_NODEV):
        return None
    return root


def _set_up(folder: Path) -> None:
    """Gives a new Debian this machine's access to the network, and makes its dpkg fast."""
    shutil.copy2("/etc/resolv.conf", folder / "etc" / "resolv.conf")
    (folder / "etc" / "dpkg" / "dpkg.cfg.d" / "fast").write_text("force-unsafe-io\n")
    if certificates := _pip_variables().get("PIP_CERT"):
        shutil.copyfile(certificates, folder / CERTIFICATES.lstrip("/"))


def _pip_variables() -> dict[str, str]:
    """How pip on this machine reaches its index, as variables; without folders of this machine."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    found = {}
    for line in listed.stdout.splitlines():
        name, _, value = line.partition("=")
        name, value = name.rpartition(".")[2], value.strip("'")
        if name in _PIP_SETTINGS and "file:" not in value:
            found[f"PIP_{name.upper().replace('-', '_')}"] = value
    return found
