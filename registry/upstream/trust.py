"""Which certificates are trusted: the system's, or those of `ca_file` instead."""

from __future__ import annotations

import logging
import ssl
import threading
from pathlib import Path

import httpx2

from storage.errors import UpstreamUnavailable

log = logging.getLogger(__name__)


class Trust:
    """One context for both HTTP libraries, made when the first https address is asked. It always verifies."""

    def __init__(self, ca_file: Path | None) -> None:
        self._ca_file = ca_file
        self._context: ssl.SSLContext | None = None
        self._lock = threading.Lock()

    def context(self) -> ssl.SSLContext:
        """Raises UpstreamUnavailable when `ca_file` cannot be read; the log says why. Blocking, some 30 ms."""
        with self._lock:
            if self._context is None:
                self._context = self._read()
            return self._context

    def _read(self) -> ssl.SSLContext:
        if self._ca_file is None:
            return httpx2.create_ssl_context()
        try:
            return ssl.create_default_context(cafile=str(self._ca_file))
        except OSError as error:  # ssl.SSLError is one
            log.error("the certificates in %s cannot be read: %s", self._ca_file, error)
            raise UpstreamUnavailable("the upstream's ca_file cannot be read; the server's log says why") from None
