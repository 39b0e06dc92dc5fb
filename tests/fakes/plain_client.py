"""HTTP clients for servers without TLS. They do not load the system's certificate authorities, which would take longer
than many tests."""

from __future__ import annotations

from typing import Any

import httpx2


def plain_client(base_url: str = "", **options: Any) -> httpx2.Client:
    """Returns an `httpx2.Client` that does not load the certificate authorities."""
    return httpx2.Client(base_url=base_url, verify=False, trust_env=False, **options)


def plain_request(method: str, url: str | httpx2.URL, **options: Any) -> httpx2.Response:
    """Sends a request like `httpx2.request`, without loading the certificate authorities."""
    return httpx2.request(method, url, verify=False, trust_env=False, **options)
