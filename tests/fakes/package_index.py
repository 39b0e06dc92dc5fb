"""A local mirror of PyPI with the packages of the lock files, for builds that can reach no other network."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def download_packages(folder: Path, python_version: str, *lock_files: Path) -> None:
    """Downloads the packages in the lock files into `folder`, as wheels for this machine. `python_version`: the version
    of Python, such as `3.11`. The files get the layout of a package index (PEP 503). Downloads from the index for which
    pip is configured."""
    files = [word for each in lock_files for word in ("--requirement", str(each))]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--require-hashes"]
    command += ["--only-binary", ":all:", "--python-version", python_version, "--dest", str(folder), *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    for wheel in list(folder.glob("*.whl")):
        project = folder / "simple" / re.sub(r"[-_.]+", "-", wheel.name.partition("-")[0]).lower()
        project.mkdir(parents=True, exist_ok=True)
        wheel.rename(project / wheel.name)


class _QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Logs nothing."""


@contextlib.contextmanager
def package_index(folder: Path) -> Iterator[str]:
    """Serves the packages that `download_packages` has written into `folder`. Yields the URL for PIP_INDEX_URL. It is
    on the loopback address of the calling thread's network namespace."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_QuietHandler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/simple"
        finally:
            server.shutdown()
            thread.join()
