"""The server's TLS certificate, reloaded without a restart when its files change.

A new certificate is loaded into a new context, which replaces the old one only if it is valid. A connection keeps the
context it began with. Changes are noticed by the files' times, and loaded once these were the same twice in a row:
programs that renew certificates write one file after the other.
"""

from __future__ import annotations

import os
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NoReturn

from registry.server.server_log import log

ClientAuth = Literal["off", "optional", "required"]
FileStamp = tuple[int, int, int] | None

_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
"""For TLS 1.2: forward secrecy, and authenticated encryption."""
_VERIFY = {"off": ssl.CERT_NONE, "optional": ssl.CERT_OPTIONAL, "required": ssl.CERT_REQUIRED}


class CertificateError(Exception):
    """The files cannot be used. `message` says why, in one line."""

    def __init__(self, message: str) -> None:
        self.message = message
        super().__init__(message)


@dataclass(frozen=True, slots=True)
class CertificateFiles:
    """PEM files."""

    certificate: Path
    """The certificate with its chain."""
    key: Path | None = None
    """Its key; None: in the certificate's file."""
    client_ca: Path | None = None
    """The authorities whose certificates clients may or must show."""
    client_auth: ClientAuth = "off"

    @property
    def paths(self) -> list[Path]:
        """The files that are given."""
        return [path for path in (self.certificate, self.key, self.client_ca) if path is not None]


class Certificates:
    """Loads the files, and reloads them when they change. `context` is for new connections."""

    def __init__(self, files: CertificateFiles, *, clock: Callable[[], float] = time.time) -> None:
        """`clock` returns seconds since 1970. Raises CertificateError."""
        self.files = files
        self._clock = clock
        self._tried = self._seen = self._stamps()
        self.context = make_context(files, clock())

    def refresh(self, *, settled: bool = False) -> None:
        """Reloads the files if they have changed. If they cannot be used, logs why and keeps the old context.

        Blocks, for microseconds if nothing has changed. `settled`: does not wait until the files' times were the same
        twice.
        """
        stamps = self._stamps()
        waits = stamps != self._seen and not settled
        self._seen = stamps
        if waits or stamps == self._tried:
            return
        self._tried = stamps
        try:
            self.context = make_context(self.files, self._clock())
        except CertificateError as error:
            log.warning("new connections go on with the certificate from before: %s", error.message)
        else:
            log.info("new connections use the certificate now in %s", self.files.certificate)

    def _stamps(self) -> list[FileStamp]:
        return [_stamp(path) for path in self.files.paths]


def make_context(files: CertificateFiles, now: float) -> ssl.SSLContext:
    """Returns a server's context for TLS 1.2 and 1.3 and HTTP/1.1. Raises CertificateError, also if the certificate has
    expired by `now` (seconds since 1970)."""
    _check_times(files.certificate, now)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(_CIPHERS)
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION | ssl.OP_CIPHER_SERVER_PREFERENCE
    context.set_alpn_protocols(["http/1.1"])
    _load_pair(context, files)
    if files.client_ca is not None and files.client_auth != "off":
        _read(files.client_ca, "certificates of the authorities for clients")
        try:
            context.load_verify_locations(files.client_ca)
        except ssl.SSLError:
            raise CertificateError(f"{files.client_ca} holds no certificate in PEM form") from None
        context.verify_mode = _VERIFY[files.client_auth]
    return context


def _load_pair(context: ssl.SSLContext, files: CertificateFiles) -> None:
    key = files.key or files.certificate
    _read(key, "key of the certificate")

    def ask() -> NoReturn:  # otherwise OpenSSL would ask on the terminal
        raise CertificateError(f"the key in {key} is protected by a password; write it without one")

    try:
        context.load_cert_chain(files.certificate, files.key, password=ask)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise CertificateError(
                f"the key in {key} does not belong to the certificate in {files.certificate}"
            ) from None
        why = f" ({error.reason.replace('_', ' ').lower()})" if error.reason else ""
        raise CertificateError(
            f"the certificate in {files.certificate} and the key in {key} cannot be used{why}"
        ) from None


def _check_times(path: Path, now: float) -> None:
    from cryptography import x509  # it is large: loaded only for TLS

    text = _read(path, "certificate")
    try:
        until = x509.load_pem_x509_certificates(text)[0].not_valid_after_utc
    except ValueError:
        raise CertificateError(f"{path} holds no certificate in PEM form") from None
    if until < datetime.fromtimestamp(now, UTC):
        raise CertificateError(f"the certificate in {path} expired on {until:%Y-%m-%d %H:%M} UTC")


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise CertificateError(f"cannot read the {what} {path}: {reason}") from None


def _stamp(path: Path) -> FileStamp:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size
