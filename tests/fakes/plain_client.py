"""HTTP clients for servers without TLS. They do not load the system's certificate authorities, which would take longer
than many tests."""

from __future__ import annotations

from typing import Any

import httpx2

TIMEOUT_SECONDS = 60.0
"""How long a client waits for a connection or the next bytes of a response, unless its caller gives another `timeout`.
The 5 seconds of httpx2 are too short for a busy machine."""


def plain_client(base_url: str = "", **options: Any) -> httpx2.Client:
    """Returns an `httpx2.Client` that does not load the certificate authorities."""
    options.setdefault("timeout", TIMEOUT_SECONDS)
    return httpx2.Client(base_url=base_url, verify=False, trust_env=False, **options)


def plain_request(method: str, url: str | httpx2.URL, **options: Any) -> httpx2.Response:
    """Sends a request like `httpx2.request`, without loading the certificate authorities."""
    options.setdefault("timeout", TIMEOUT_SECONDS)
    return httpx2.request(method, url, verify=False, trust_env=False, **options)
