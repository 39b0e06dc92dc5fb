"""The OCI distribution API, which serves a `Registry` to clients over HTTP."""

from registry.http.api import DistributionAPI
from registry.http.exchange import RequestLimits
from registry.http.namespaces import Namespaces
from registry.http.www_authenticate import Authenticator, Challenges

__all__ = ["Authenticator", "Challenges", "DistributionAPI", "Namespaces", "RequestLimits"]
