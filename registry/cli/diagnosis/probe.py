"""`probe`: connects to a registry's address as a client does, and returns the response or the error."""

from __future__ import annotations

import http.client
import socket
import ssl
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from registry.status.worker_report import INSTANCE_HEADER

PROBE_SECONDS: Final = 5.0
"""Time limit for each attempt to connect, and for each read from the connection or write to it."""


class ProbeError(StrEnum):
    """The reasons why a probe got no response."""

    DNS = "the name is not known"
    REFUSED = "nothing listens there"
    TIMEOUT = "no answer in time"
    UNREACHABLE = "no connection"
    UNTRUSTED = "the certificate is not trusted"
    NO_TLS = "it speaks no TLS"
    CLIENT_CERTIFICATE = "it requires a client certificate"
    TLS_ENDED = "it ends the TLS connection"
    NO_HTTP = "it does not answer plain HTTP"


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """The result of a probe.

    - `error`: why there was no response; None if there was a response.
    - `detail`: a message about the error, such as the operating system's message; may be empty.
    - `instance`: the random id of a running Entrepot server (header `X-Entrepot-Instance`), which changes at each
      start. None if there was no response, or if the server is not Entrepot.
    - `status`: the HTTP status of the response to GET `/v2/`; 0 if there was no response.
    - `is_registry`: whether the response to GET `/v2/` is that of a registry."""

    url: str
    error: ProbeError | None = None
    detail: str = ""
    instance: str | None = None
    status: int = 0
    is_registry: bool = False


def probe(url: str, ca_file: Path | None = None, seconds: float = PROBE_SECONDS) -> ProbeResult:
    """Requests `/livez` and `/v2/` at `url`, such as `https://host:5000`. Blocks. `ca_file`: the certificate of a CA to
    trust in addition to the CAs of the system. `seconds`: the time limit, as described for `PROBE_SECONDS`. Does not
    raise network errors, but returns them in the result."""
    try:
        _, live_headers = _get(url, "/livez", ca_file, seconds)
        status, headers = _get(url, "/v2/", ca_file, seconds)
    except ssl.SSLCertVerificationError as error:
        return ProbeResult(url, ProbeError.UNTRUSTED, error.verify_message)
    except ssl.SSLError as error:
        reason = (error.reason or str(error)).replace("_", " ").lower()
        return ProbeResult(url, _tls_error(reason), reason)
    except socket.gaierror as error:
        return ProbeResult(url, ProbeError.DNS, error.strerror or str(error))
    except ConnectionRefusedError as error:
        return ProbeResult(url, ProbeError.REFUSED, error.strerror or "")
    except TimeoutError:
        return ProbeResult(url, ProbeError.TIMEOUT, f"{seconds:g} s")
    except ConnectionResetError as error:
        # If the client has no certificate, some servers with TLS 1.3 reset the connection without an alert, for example
        # servers that use asyncio in Python 3.11.
        kind = ProbeError.TLS_ENDED if urlsplit(url).scheme == "https" else ProbeError.NO_HTTP
        return ProbeResult(url, kind, str(error) or type(error).__name__)
    except http.client.HTTPException as error:
        return ProbeResult(url, ProbeError.NO_HTTP, str(error) or type(error).__name__)
    except OSError as error:
        return ProbeResult(url, ProbeError.UNREACHABLE, error.strerror or str(error))
    is_registry = status in (200, 401) and "docker-distribution-api-version" in headers
    return ProbeResult(url, None, "", live_headers.get(INSTANCE_HEADER), status, is_registry)


def _tls_error(reason: str) -> ProbeError:
    """Returns the ProbeError for a TLS error. `reason`: OpenSSL's name of the error, in lower case."""
    if "alert certificate required" in reason:  # TLS 1.3 (RFC 8446, 6.2)
        return ProbeError.CLIENT_CERTIFICATE
    # A missing client certificate is only one of the reasons for this alert of TLS 1.2 (RFC 5246, 7.4.6).
    return ProbeError.TLS_ENDED if "alert handshake failure" in reason else ProbeError.NO_TLS


def _get(url: str, path: str, ca_file: Path | None, seconds: float) -> tuple[int, dict[str, str]]:
    """Sends a GET request, and returns the status and the headers of the response. The names of the headers are in
    lower case. Raises OSError, HTTPException."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        context = ssl.create_default_context()
        if ca_file is not None:
            context.load_verify_locations(ca_file)
        connection = http.client.HTTPSConnection(host, parts.port, timeout=seconds, context=context)
    else:
        connection = http.client.HTTPConnection(host, parts.port, timeout=seconds)
    try:
        connection.connect()
        # Sending fails if the server has closed the connection. But `getresponse` can still read why, such as the alert
        # of TLS 1.3 for a missing client certificate.
        with suppress(BrokenPipeError, ConnectionResetError, ssl.SSLEOFError):
            connection.request("GET", path, headers={"User-Agent": "entrepot-check"})
        response = connection.getresponse()
        response.read(65536)
        return response.status, {name.lower(): value for name, value in response.getheaders()}
    finally:
        connection.close()
