"""Builds the container image of a release, if a docker daemon runs on this machine."""

from __future__ import annotations

import shutil
import subprocess

from release.programs import run
from release.source_tree import SourceTree


def daemon_answers() -> bool:
    """Returns whether docker is installed and its daemon answers."""
    if shutil.which("docker") is None:
        return False
    return subprocess.run(["docker", "info"], capture_output=True, check=False).returncode == 0


def build_image(source: SourceTree, version: str) -> str:
    """Builds the image of `deploy/Dockerfile` and returns its name. Raises ReleaseFailed if the build fails."""
    name = f"entrepot:{version}"
    labels = {"org.opencontainers.image.version": version, "org.opencontainers.image.revision": source.commit}
    options = [word for key, value in labels.items() for word in ("--label", f"{key}={value}")]
    options += ["--build-arg", f"SOURCE_DATE_EPOCH={source.committed_at}", "--file", "deploy/Dockerfile"]
    run("docker", "build", "--quiet", *options, "--tag", name, ".", cwd=source.folder)
    return name
