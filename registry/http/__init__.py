"""The OCI distribution API, which serves a `Registry` to clients over HTTP."""

from registry.http.api import DistributionAPI
from registry.http.challenge import Authenticator, Challenges
from registry.http.exchange import RequestLimits
from registry.http.namespaces import Namespaces

__all__ = ["Authenticator", "Challenges", "DistributionAPI", "Namespaces", "RequestLimits"]
