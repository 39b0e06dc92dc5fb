"""The server's TLS certificate, reloaded without a restart when its files change.

The files are loaded into a new TLS context (`ssl.SSLContext`), which replaces the old context only if the certificate
is valid. An open connection keeps the context with which it was opened.

`Certificates.refresh` notices a change by the files' states (`FileState`): times, inode numbers and sizes. Programs
that renew certificates write one file after the other. So changed files are loaded only when two checks in a row have
found the same states, or when the caller knows that the files are complete.
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
from registry.small_files import read_small_file

ClientAuth = Literal["off", "optional", "required"]
FileState = tuple[int, int, int, int] | None
"""Numbers by which a change of a file is noticed: mtime and ctime in nanoseconds, the inode number, and the size in
bytes. None if stat(2) fails for the file."""

_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
"""Ciphers for TLS 1.2, in OpenSSL's syntax: only those with forward secrecy and authenticated encryption."""
_VERIFY_MODES = {"off": ssl.CERT_NONE, "optional": ssl.CERT_OPTIONAL, "required": ssl.CERT_REQUIRED}


class CertificateError(Exception):
    """The server cannot use the certificate files. `message` says why, in one line."""

    def __init__(self, message: str) -> None:
        self.message = message
        super().__init__(message)


@dataclass(frozen=True, slots=True)
class CertificateFiles:
    """The paths of the certificate, of its key, and of the authorities for client certificates. The files are in PEM
    format."""

    certificate: Path
    """The server's certificate, followed by its chain."""
    key: Path | None = None
    """The certificate's private key. None if the key is in the certificate's file."""
    client_ca: Path | None = None
    """The certificates of the authorities that sign client certificates. If None, the server does not ask for client
    certificates."""
    client_auth: ClientAuth = "off"
    """Whether clients may (`optional`) or must (`required`) present a certificate signed by `client_ca`. With `off`,
    the server does not ask for a client certificate."""

    @property
    def paths(self) -> list[Path]:
        """The paths that are not None."""
        return [path for path in (self.certificate, self.key, self.client_ca) if path is not None]


class Certificates:
    """Loads the certificate files, and reloads them after a change. The attribute `context` is the TLS context for new
    connections."""

    def __init__(self, files: CertificateFiles, *, clock: Callable[[], float] = time.time) -> None:
        """`clock` returns seconds since 1970. Raises CertificateError if the files cannot be used."""
        self.files = files
        self._clock = clock
        self._last_checked_states = self._file_states()  # the files' states at the last check
        self._last_load_states = self._last_checked_states  # the files' states at the last attempt to load them
        self._last_load_failed = False  # whether the last attempt to load the files failed
        self.context = make_context(files, clock())

    def refresh(self, *, are_files_complete: bool = False) -> None:
        """Reloads the files if they have changed since the last attempt to load them. If the server cannot use the
        files, logs why and keeps the old context.

        - If the states of the files differ from those at the previous call, a program may still be writing the files,
          so this call loads nothing. The next call loads the files if it finds the same states as this call.
        - If `are_files_complete` is True, no program is still writing the files, so this call loads changed files. It
          also loads unchanged files again if the last attempt failed.

        Blocks, but only for microseconds if nothing has changed.
        """
        states = self._file_states()
        may_be_incomplete = states != self._last_checked_states and not are_files_complete
        self._last_checked_states = states
        # The failed attempt may have had another cause than the files, such as too many open files.
        is_retry = self._last_load_failed and are_files_complete
        if may_be_incomplete or (states == self._last_load_states and not is_retry):
            return
        self._last_load_states, self._last_load_failed = states, True
        try:
            self.context = make_context(self.files, self._clock())
        except CertificateError as error:
            log.warning("new connections still use the old certificate: %s", error.message)
        else:
            self._last_load_failed = False
            log.info("reloaded the certificate %s: new connections use it", self.files.certificate)

    def _file_states(self) -> list[FileState]:
        return [_file_state(path) for path in self.files.paths]


def make_context(files: CertificateFiles, now: float) -> ssl.SSLContext:
    """Returns the server's TLS context, for TLS 1.2 and 1.3 and HTTP/1.1. Raises CertificateError if the server cannot
    use the files, or if the certificate has expired at `now` (seconds since 1970)."""
    _check_expiry(files.certificate, now)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(_CIPHERS)
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION | ssl.OP_CIPHER_SERVER_PREFERENCE
    context.set_alpn_protocols(["http/1.1"])
    _load_certificate_and_key(context, files)
    if files.client_ca is not None and files.client_auth != "off":
        description = "certificates of the authorities for clients"
        # Called only for its errors, which name the file; the errors of `load_verify_locations` do not.
        _read(files.client_ca, description)
        try:
            context.load_verify_locations(files.client_ca)
        except ssl.SSLError:
            raise CertificateError(f"{files.client_ca} holds no certificate in PEM form") from None
        except OSError as error:  # the file was removed after it was read above
            raise _unreadable_file_error(files.client_ca, description, error) from None
        context.verify_mode = _VERIFY_MODES[files.client_auth]
    return context


def _load_certificate_and_key(context: ssl.SSLContext, files: CertificateFiles) -> None:
    """Loads the certificate, its chain and its key into `context`. Raises CertificateError if the server cannot use
    them."""
    key_path = files.key or files.certificate
    description = "key of the certificate"
    # Called only for its errors, which name the file; the errors of `load_cert_chain` do not.
    _read(key_path, description)

    def refuse_password() -> NoReturn:  # without this function, OpenSSL would ask for the password on the terminal
        raise CertificateError(f"the key in {key_path} is protected by a password; write it without one")

    try:
        context.load_cert_chain(files.certificate, files.key, password=refuse_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise CertificateError(
                f"the key in {key_path} does not belong to the certificate in {files.certificate}"
            ) from None
        reason_text = f" ({error.reason.replace('_', ' ').lower()})" if error.reason else ""
        raise CertificateError(
            f"the certificate in {files.certificate} and the key in {key_path} cannot be used{reason_text}"
        ) from None
    except OSError as error:
        # The certificate or the key was removed after it was read. `error` does not say which of the two, so the next
        # line reads the certificate again.
        _read(files.certificate, "certificate")
        raise _unreadable_file_error(key_path, description, error) from None


def expiry_of(path: Path) -> datetime:
    """Returns when the first certificate in the file expires. Raises CertificateError if the file cannot be read or has
    no certificate."""
    from cryptography import x509  # imported here because it is large, and only servers with TLS need it

    pem = _read(path, "certificate")
    try:
        return x509.load_pem_x509_certificates(pem)[0].not_valid_after_utc
    except ValueError:
        raise CertificateError(f"{path} holds no certificate in PEM form") from None
    except x509.InvalidVersion:
        raise CertificateError(f"the certificate in {path} has an unknown version; X.509 version 3 is usual") from None


def _check_expiry(path: Path, now: float) -> None:
    """Raises CertificateError if the first certificate in the file has expired at `now` (seconds since 1970), if the
    file cannot be read, or if it has no certificate."""
    expires_at = expiry_of(path)
    if expires_at < datetime.fromtimestamp(now, UTC):
        raise CertificateError(f"the certificate in {path} expired on {expires_at:%Y-%m-%d %H:%M} UTC")


def _read(path: Path, description: str) -> bytes:
    """Returns the content of the file. Raises CertificateError if the file cannot be read. `description` says what the
    file contains, for the text of the error."""
    try:
        return read_small_file(path)
    except OSError as error:
        raise _unreadable_file_error(path, description, error) from None


def _unreadable_file_error(path: Path, description: str, error: OSError) -> CertificateError:
    """Returns the error for a file that cannot be read. `description` says what the file contains."""
    return CertificateError(f"cannot read the {description} {path}: {(error.strerror or str(error)).lower()}")


def _file_state(path: Path) -> FileState:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_size
