"""A certificate authority for tests. It signs certificates with openssl."""

from __future__ import annotations

import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.fakes.clients.programs import environment

NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2")


@dataclass(frozen=True)
class CertificateBundle:
    """Paths of PEM files."""

    authority: Path
    """The certificate of the authority, which a client has to trust."""
    server: Path
    """The certificate of a server, for 127.0.0.1 and localhost."""
    key: Path


PAST_SETTINGS = """
[ca]
default_ca = past
[past]
database = {folder}/index
new_certs_dir = {folder}
rand_serial = yes
default_md = sha256
default_startdate = 20260101000000Z
default_enddate = 20260102000000Z
copy_extensions = copy
policy = anything
[anything]
commonName = supplied
"""
"""Settings of `openssl ca` for certificates that were valid on one day in the past."""


@dataclass(frozen=True)
class KeyPair:
    """Paths of the PEM files with a certificate and its key."""

    certificate: Path
    key: Path


class CertificateAuthority:
    """A new authority. It keeps its files in a new folder below `tmp_path`."""

    def __init__(self, tmp_path: Path) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="certificates-", dir=tmp_path))
        self.certificate = self._folder / "authority.pem"
        self._key = self._folder / "authority.key"
        usage = "keyUsage=critical,keyCertSign,cRLSign"
        name_and_files = ("-subj", "/CN=tests", "-keyout", str(self._key), "-out", str(self.certificate))
        self._openssl("req", "-x509", *NEW_KEY, *name_and_files, "-addext", usage)

    def sign(self, name: str, *, client: bool = False, also: str = "") -> KeyPair:
        """Makes a key and a certificate for a server on this machine or, with `client`, for a client. `also`: another
        IP address for which the certificate is valid."""
        pair = KeyPair(self._folder / f"{name}.pem", self._folder / f"{name}.key")
        signed = ["-CA", str(self.certificate), "-CAkey", str(self._key)]
        files = ["-keyout", str(pair.key), "-out", str(pair.certificate)]
        extensions = [
            "subjectAltName=IP:127.0.0.1,DNS:localhost" + (f",IP:{also}" if also else ""),
            "basicConstraints=critical,CA:FALSE",
            "keyUsage=critical,digitalSignature",
            f"extendedKeyUsage={'clientAuth' if client else 'serverAuth'}",
        ]
        added = [word for each in extensions for word in ("-addext", each)]
        self._openssl("req", "-x509", *NEW_KEY, "-subj", f"/CN={name}", *signed, *files, *added)
        return pair

    def expired(self, pair: KeyPair) -> KeyPair:
        """Makes a self-signed certificate with the name and the key of `pair`. The certificate has expired."""
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        request, old, settings = folder / "request", pair.certificate.with_suffix(".old.pem"), folder / "settings"
        settings.write_text(PAST_SETTINGS.format(folder=folder))
        (folder / "index").touch()
        key, copied = str(pair.key), ("-copy_extensions", "copyall")
        request_options = ("-in", str(pair.certificate), "-signkey", key, *copied, "-out", str(request))
        self._openssl("x509", "-x509toreq", *request_options)
        # `openssl x509` is not enough: in OpenSSL 3.0 it cannot set the dates, and from 3.5 on it refuses past ones.
        signed = ("-selfsign", "-keyfile", key, "-in", str(request), "-out", str(old), "-notext")
        self._openssl("ca", "-batch", "-config", str(settings), *signed)
        return KeyPair(old, pair.key)

    def locked(self, pair: KeyPair) -> KeyPair:
        """Returns the same certificate with a key that is encrypted with a password."""
        key = pair.key.with_suffix(".locked.key")
        self._openssl("pkey", "-in", str(pair.key), "-aes256", "-passout", "pass:secret", "-out", str(key))
        return KeyPair(pair.certificate, key)

    def _openssl(self, *arguments: str) -> None:
        done = subprocess.run(
            ["openssl", *arguments], env=environment(self._folder), cwd=self._folder, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


def certificates(tmp_path: Path) -> CertificateBundle:
    """Makes an authority and certificates that it has signed."""
    authority = CertificateAuthority(tmp_path)
    pair = authority.sign("localhost")
    return CertificateBundle(authority.certificate, pair.certificate, pair.key)
