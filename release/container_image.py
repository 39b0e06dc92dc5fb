"""The container image, on a machine where a docker daemon runs."""

from __future__ import annotations

import shutil
import subprocess

from release.programs import run
from release.source_tree import SourceTree


def daemon_answers() -> bool:
    """Whether there is a docker with a daemon."""
    if shutil.which("docker") is None:
        return False
    return subprocess.run(["docker", "info"], capture_output=True, check=False).returncode == 0


def build_image(source: SourceTree, version: str) -> str:
    """Builds `deploy/Dockerfile` and returns the image's name. Raises ReleaseFailed if it cannot be built."""
    name = f"entrepot:{version}"
    labels = {"org.opencontainers.image.version": version, "org.opencontainers.image.revision": source.commit}
    options = [word for key, value in labels.items() for word in ("--label", f"{key}={value}")]
    options += ["--build-arg", f"SOURCE_DATE_EPOCH={source.committed_at}", "--file", "deploy/Dockerfile"]
    run("docker", "build", "--quiet", *options, "--tag", name, ".", cwd=source.folder)
    return name
