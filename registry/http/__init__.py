"""HTTP to clients: the OCI distribution API over a Registry."""

from registry.http.api import DistributionAPI
from registry.http.limits import Limits

__all__ = ["DistributionAPI", "Limits"]
