"""Tests of the rules for the realm in a login challenge, which is the URL of the token service: no challenge can make
the upstream client send its password to a service of somebody else."""

from __future__ import annotations

import pytest

from registry.config import Upstream
from registry.upstream.challenges import RealmPolicy
from registry.upstream.destinations import registrable_domain
from storage.errors import UpstreamUnavailable


@pytest.mark.parametrize(
    ("host", "domain"),
    [
        ("registry-1.docker.io", "docker.io"),
        ("GHCR.io", "ghcr.io"),
        ("localhost", "localhost"),
        ("a.b.example.co.uk", "example.co.uk"),
        ("registry.example.de", "example.de"),
        ("tenant.azurecr.io", "tenant.azurecr.io"),
        ("1.dkr.ecr.eu-west-1.amazonaws.com", "eu-west-1.amazonaws.com"),
        ("10.1.2.3", "10.1.2.3"),
        ("::1", "::1"),
    ],
)
def test_registrable_domain(host: str, domain: str) -> None:
    """The registrable domain is the part of a host name that belongs to one owner."""
    assert registrable_domain(host) == domain


def test_too_long_host_has_no_registrable_domain() -> None:
    """A host name longer than 253 characters is returned unchanged."""
    host = "a." * 2000 + "example.com"
    assert registrable_domain(host) == host


@pytest.mark.parametrize(
    ("endpoint", "realm", "allowed"),
    [
        ("https://registry-1.docker.io", "https://auth.docker.io/token", True),
        ("https://registry-1.docker.io", "https://auth.docker.io:8443/token", True),
        ("https://registry-1.docker.io", "http://auth.docker.io/token", False),
        ("https://registry-1.docker.io", "https://evil.io/token", False),
        ("https://registry-1.docker.io", "https://evildocker.io/token", False),
        ("https://registry-1.docker.io", "https://docker.io.evil.io/token", False),
        ("https://registry-1.docker.io", "https://docker.io@evil.io/token", False),
        ("https://registry-1.docker.io", "https://evil.io\\@docker.io/token", False),
        ("https://registry-1.docker.io", "https://user:pw@auth.docker.io/token", False),
        ("https://registry-1.docker.io", "auth.docker.io/token", False),
        ("https://registry-1.docker.io", "", False),
        ("https://registry-1.docker.io", "https://[/token", False),
        ("https://one.azurecr.io", "https://two.azurecr.io/token", False),
        ("https://one.azurecr.io", "https://one.azurecr.io/oauth2/token", True),
        ("https://cache.example.com", "https://login.other.net/token", True),
        ("https://cache.example.com", "https://login.other.net/token/more", True),
        ("https://cache.example.com", "https://login.other.net/tokens", False),
        ("https://cache.example.com", "https://login.other.net:444/token", False),
        ("https://cache.example.com", "https://login.other.net/token/../other", False),
        ("https://cache.example.com", "https://login.other.net/token/%2e%2E/other", False),
        ("https://cache.example.com", "https://login.other.net/token\\..\\..\\other", False),
        ("https://cache.example.com", "https://login.other.net/token%2f../other", False),
        ("https://cache.example.com", "https://login.other.net/token/..;/other", False),
        ("https://cache.example.com", "https://login.other.net/token/..;x=1/other", False),
        ("https://cache.example.com", "https://login.other.net/token/%2e%2e%3b/other", False),
        ("https://cache.example.com", "https://login.other.net/token/%252e%252e/other", False),
        ("https://cache.example.com", "https://login.other.net/token/..%255cother", False),
        ("https://cache.example.com", "https://login.other.net/token/more/../..;/other", False),
        ("https://cache.example.com", "https://login.other.net/token/%zz", False),
        ("https://cache.example.com", "https://login.other.net/t%6fken/more", True),
        ("https://cache.example.com", "https://login.other.net/odd;v=1/%252f", True),
        ("https://cache.example.com", "https://login.other.net/odd;v=1/%252f?account=me", True),
        ("https://cache.example.com", "https://login.other.net/odd;v=1/%252f/more", False),
        ("https://cache.example.com", "https://login.other.net/odd;v=1", False),
        ("https://cache.example.com", "https://whole.other.net/any/..;/%252e", True),
        ("https://cache.example.com", "https://login.other.net/./token", True),
        ("https://cache.example.com", "https://login.other.net\\.example.com/token", False),
        ("https://cache.example.com", "https://login.other.net%2f.example.com/token", False),
        ("https://cache.example.com", "https://cache.example.com:0/token", False),
        ("https://strasse.example", "https://stra\u00dfe.example/token", False),
        ("https://reg.example.com", "https://\uff52eg.example.com/token", False),
        ("https://cache.example.com", "https://whole.other.net/any", True),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5001/auth", True),
        ("http://127.0.0.1:5000", "http://127.0.0.2:5001/auth", False),
        ("http://127.0.0.1:5000", "https://127.0.0.1:5001/auth", True),
    ],
)
def test_realms(endpoint: str, realm: str, allowed: bool) -> None:
    """A realm is allowed in three cases: an https URL on the domain of the upstream, a URL that the setting `realms`
    lists, and an http URL on the host of an http endpoint. A listed path includes the paths below it, unless a server
    could read such a path as one elsewhere."""
    settings = Upstream.model_validate(
        {
            "name": "docker.io" if "docker" in endpoint else "example.com",
            "endpoints": [endpoint],
            "realms": [
                *("https://login.other.net/token", "https://login.other.net/odd;v=1/%252f", "https://whole.other.net"),
            ],
        }
    )
    realms = RealmPolicy(settings, [endpoint])
    if allowed:
        realms.raise_if_refused(realm, endpoint, sends_password=False)
    else:
        with pytest.raises(UpstreamUnavailable):
            realms.raise_if_refused(realm, endpoint, sends_password=False)


@pytest.mark.parametrize(
    ("endpoint", "realm", "allowed"),
    [
        ("https://registry-1.docker.io", "https://auth.docker.io/token", True),
        ("https://registry-1.docker.io", "https://auth.docker.io:8443/token", False),
        ("https://reg.example.com:5443", "https://reg.example.com:5443/token", True),
        ("https://reg.example.com:5443", "https://auth.example.com:5443/token", True),
        ("https://reg.example.com:5443", "https://auth.example.com/token", True),
        ("https://reg.example.com:5443", "https://reg.example.com/token", False),
        ("https://reg.example.com:5443", "https://reg.example.com:9000/token", True),
        ("http://reg.example.com:5000", "http://reg.example.com:5001/token", False),
        ("http://reg.example.com:5000", "http://reg.example.com:5000/token", True),
        ("http://reg.example.com:5000", "https://reg.example.com/token", False),
        ("https://reg.example.com:5443", "https://reg.example.com./token", False),
        ("https://reg.example.com:5443", "https://reg.example.com.:5443/token", True),
        ("https://reg.example.com.:5443", "https://reg.example.com/token", False),
        ("https://reg.example.com:5443", "https://reg.example.com.:9000/token", True),
    ],
)
def test_ports_that_get_the_password(endpoint: str, realm: str, allowed: bool) -> None:
    """The password is sent only to the port of the endpoint, to port 443 of other hosts of the same domain, and to URLs
    that `realms` lists, because another port may be another service. Without a password, the other ports are allowed
    too."""
    settings = Upstream.model_validate(
        {
            "name": "docker.io" if "docker" in endpoint else "example.com",
            "endpoints": [endpoint],
            "realms": ["https://reg.example.com:9000"],
        }
    )
    realms = RealmPolicy(settings, [endpoint])
    realms.raise_if_refused(realm, endpoint, sends_password=False)
    if allowed:
        realms.raise_if_refused(realm, endpoint, sends_password=True)
    else:
        with pytest.raises(UpstreamUnavailable, match="another port"):
            realms.raise_if_refused(realm, endpoint, sends_password=True)


@pytest.mark.parametrize(("configured_name", "allowed"), [("ghcr.io", True), (None, False)])
def test_the_name_in_the_settings_counts_for_a_client_of_another_name(
    configured_name: str | None, allowed: bool
) -> None:
    """An import has a client with a name of its own. If it uses the login of an upstream in the settings, the domain of
    that upstream's name may have the token service."""
    endpoint = "https://proxy.corp.test"
    settings = Upstream.model_validate({"name": "import-proxy-corp-test", "endpoints": [endpoint]})
    realms = RealmPolicy(settings, [endpoint], configured_name)
    if allowed:
        realms.raise_if_refused("https://ghcr.io/token", endpoint, sends_password=True)
    else:
        with pytest.raises(UpstreamUnavailable):
            realms.raise_if_refused("https://ghcr.io/token", endpoint, sends_password=True)
