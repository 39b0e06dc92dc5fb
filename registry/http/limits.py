"""How much one request may ask for."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one request. The defaults suit the clients that were looked at; each says why."""

    manifest: int = 8 * MIB
    """Bytes of a manifest. The spec wants at least 4 MB ("Pushing Manifests"); beyond: 413."""
    tags_per_put: int = 64
    """Tags that one PUT may set. The spec wants at least 10; beyond: 414. Each is a header line of the answer, and
    common HTTP clients refuse one with more than 100 lines."""
    tags_page: int = 10_000
    """Tags on a page when the client names no `n`, and at the most. Generous, for clients that do not follow Link."""
    catalog_page: int = 1_000
    """Repositories on a page when the client names no `n`."""
    catalog_most: int = 10_000
    """Repositories on a page at the most, whatever `n` says."""
    referrers_page: int = 1_000
    """Descriptors on a page of referrers at the most."""
    referrers_bytes: int = 4 * MIB - 64 * 1024
    """Bytes of a page of referrers: it has to fit where a manifest of 4 MiB fits ("Listing Referrers")."""
    ranges: int = 1_024
    """Ranges in one request. Clients that read layers in part ask for up to 1024, and for half as many after a 400."""
