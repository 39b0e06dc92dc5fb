"""Makes a minimal Debian system in a folder, of the same release as the Debian of this machine."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.fakes.clients.programs import environment
from tests.fakes.deployment.debootstrap import KEYRING, debian_mirror, machine_release, make_debian

# Files that `write_archive` leaves out: a container gets its own /dev, /proc and /sys, and needs no downloads of apt.
NOT_IN_ARCHIVE = ("./dev/*", "./proc/*", "./sys/*", "./var/cache/apt/*.bin", "./var/cache/apt/archives/*.deb")


@dataclass(frozen=True)
class DebianTree:
    """A Debian system whose root directory is `folder`."""

    folder: Path

    def run(self, *command: str) -> str:
        """Runs a command in the system, as root, and returns its output. Raises AssertionError if the command fails."""
        return _run("chroot", str(self.folder), *command, home=self.folder / "root")

    def install(self, *packages: str) -> None:
        """Installs Debian packages, without the packages that they only recommend."""
        self.run("apt-get", "install", "--yes", "-qq", "--no-install-recommends", *packages)

    def copy(self, folder: Path) -> DebianTree:
        """Copies all files to `folder`, which must not exist yet. Returns the copy."""
        subprocess.run(["cp", "--archive", "--reflink=auto", str(self.folder), str(folder)], check=True)
        return DebianTree(folder)

    def write_archive(self, path: Path) -> Path:
        """Writes the files as a tar archive for `docker import`."""
        left_out = [f"--exclude={pattern}" for pattern in NOT_IN_ARCHIVE]
        _run("tar", "--create", f"--file={path}", *left_out, f"--directory={self.folder}", ".", home=path.parent)
        return path


def make_debian_tree(folder: Path, *packages: str) -> DebianTree:
    """Makes a minimal system with `packages` in `folder`. Raises AssertionError if debootstrap fails."""
    make_debian(folder, machine_release(), packages)
    shutil.rmtree(folder / "var" / "cache" / "apt" / "archives")
    (folder / "var" / "cache" / "apt" / "archives" / "partial").mkdir(parents=True)
    return DebianTree(folder)


def unpack_package(folder: Path, package: str, release: str) -> Path:
    """Downloads a package of another Debian release and unpacks it below `folder`, which must not exist yet. Does not
    install it. Returns the folder with the unpacked files. Raises AssertionError if apt fails."""
    lists, root = folder / "lists", folder / "root"
    (lists / "partial").mkdir(parents=True)
    source = folder / "release.list"
    source.write_text(f"deb [signed-by={KEYRING}] {debian_mirror()} {release} main\n")
    values = {
        "APT::Sandbox::User": "root",
        "Acquire::Languages": "none",
        "Dir::Cache": str(folder / "cache"),
        "Dir::Etc::SourceList": str(source),
        "Dir::Etc::SourceParts": "-",
        "Dir::State::Lists": str(lists),
    }
    apt = ("apt-get", "-qq", *(word for name, value in values.items() for word in ("-o", f"{name}={value}")))
    _run(*apt, "update", home=folder)
    _run(*apt, "download", package, home=folder)
    (archive,) = folder.glob("*.deb")
    _run("dpkg", "--extract", str(archive), str(root), home=folder)
    return root


def _run(*command: str, home: Path) -> str:
    env = environment(home, DEBIAN_FRONTEND="noninteractive", LC_ALL="C.UTF-8", TMPDIR="/tmp")
    done = subprocess.run(
        command, env=env, cwd=home, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr}"
    return done.stdout
