"""An authority of the tests' own and a certificate for this machine, made by openssl."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.clients.running import environment

NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2")


@dataclass(frozen=True)
class Certificates:
    """PEM files."""

    authority: Path
    """What a client has to trust."""
    server: Path
    """For 127.0.0.1 and localhost."""
    key: Path


def certificates(tmp_path: Path) -> Certificates:
    """A new authority, and what it has signed."""
    folder = Path(tempfile.mkdtemp(prefix="certificates-", dir=tmp_path))
    made = Certificates(folder / "authority.pem", folder / "server.pem", folder / "server.key")
    signer = folder / "authority.key"
    usage = "keyUsage=critical,keyCertSign,cRLSign"
    _openssl(folder, "-subj", "/CN=tests", "-keyout", str(signer), "-out", str(made.authority), "-addext", usage)
    signed = ["-CA", str(made.authority), "-CAkey", str(signer), "-keyout", str(made.key), "-out", str(made.server)]
    extensions = [
        "subjectAltName=IP:127.0.0.1,DNS:localhost",
        "basicConstraints=critical,CA:FALSE",
        "keyUsage=critical,digitalSignature",
        "extendedKeyUsage=serverAuth",
    ]
    _openssl(folder, "-subj", "/CN=localhost", *signed, *(word for each in extensions for word in ("-addext", each)))
    return made


def _openssl(folder: Path, *arguments: str) -> None:
    command: Sequence[str] = ["openssl", "req", "-x509", *NEW_KEY, *arguments]
    done = subprocess.run(command, env=environment(folder), cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
