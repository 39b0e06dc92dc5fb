"""Tests of how the client for upstream registries chooses the URL and the proxy of its next request."""

from __future__ import annotations

import httpx2
import pytest

from registry.config import Upstream
from registry.upstream.destinations import RedirectChain, origin
from registry.upstream.link_header import next_page_url
from registry.upstream.transport import OutboundProxies
from storage.errors import UpstreamUnavailable

URL = "https://far.test/v2/a/tags/list?n=5"


@pytest.mark.parametrize(
    ("link", "next_url"),
    [
        ("", None),
        ('</v2/a/tags/list?n=5&last=x>; rel="next"', "https://far.test/v2/a/tags/list?n=5&last=x"),
        ("<list?last=x>;rel=next", "https://far.test/v2/a/tags/list?last=x"),
        ('<?last=x>; title="a, <b>"; rel="prev next"', "https://far.test/v2/a/tags/list?last=x"),
        ("<http://evil.test:81/v2/x?last=x>; rel=next", "https://far.test/v2/x?last=x"),
        ('</a>; rel="prev", </b>; rel="next"', "https://far.test/b"),
        ('</a>; rel="nextish"', None),
        ("</a>", None),
        ("nonsense", None),
    ],
)
def test_next_pages(link: str, next_url: str | None) -> None:
    """The header `Link` is parsed as in RFC 8288. The next page is always requested from the same origin, even if
    `Link` names another host."""
    assert next_page_url({"link": link}, URL) == next_url


@pytest.mark.parametrize(
    "link",
    [
        *("x:.evil.test/p", "x:-evil.test/p", "x:@evil.test/p", "x:1/p", "x::1/p", "x:%2eevil.test/p"),
        *("x:\\.evil.test/p", "x:\\@evil.test/p", "x:\u3002evil.test/p", "x:\u00ad.evil.test/p", "x:", "x:?p"),
        *("\t x:\t.evil.test/p", "javascript:.evil.test", "//[evil/p", "https://evil.test", "https://evil.test?p"),
    ],
)
@pytest.mark.parametrize("url", [URL, "https://far.test:5000/v2/a/tags/list", "http://[fd00::1]/v2/a/tags/list"])
def test_links_whose_path_would_change_the_host_are_refused(link: str, url: str) -> None:
    """A link to a next page is refused if its path does not begin with `/`. Appended to the host of the
    list, such a path would name another host or port."""
    with pytest.raises(
        UpstreamUnavailable, match=r"Link to the next page: it(s path does not begin with /| is not a URL)"
    ):
        next_page_url({"link": f'<{link}>; rel="next"'}, url)


@pytest.mark.parametrize(
    "link",
    [
        *("//evil.test/p", "///evil.test/p", "////evil.test/p", "/\\evil.test/p", "\\\\evil.test/p"),
        *("x:/p", "x://evil.test/p"),
        *("https:/\\evil.test/p", "http://evil.test:1/p", "/@evil.test/p", "/%2f%2fevil.test/p", ".evil.test/p"),
        *("https:.evil.test/p", "@evil.test/p", "\x01//evil.test/p", "/\t/evil.test/p", "\uff0f\uff0fevil.test/p"),
    ],
)
def test_next_pages_are_on_the_origin_of_the_list(link: str) -> None:
    """Whatever a link names, the next page is requested from the host and port of the list."""
    next_url = next_page_url({"link": f'<{link}>; rel="next"'}, URL)
    assert next_url is not None
    assert origin(next_url) == origin(URL)
    assert next_url.startswith("https://far.test/")
    client_url = httpx2.URL(next_url)
    assert (client_url.scheme, client_url.host, client_url.port) == ("https", "far.test", None)


@pytest.mark.parametrize(
    "url",
    [
        *("https://fa\u00df.test/", "https://\u03b2\u03cc\u03bb\u03bf\u03c2.test/", "https://a\u200cb.test/"),
        *("https://\uff52eg.test/", "https://b\u00fccher.test/", "https://B\u00dcCHER.test/", "https://far\u3002test/"),
        *("https://FAR.test:444/", "https://[FD00::1]:5000/"),
    ],
)
def test_origin_has_the_host_to_which_the_client_connects(url: str) -> None:
    """The host of an origin is the host to which the HTTP client connects, even for an international name. A name that
    the client refuses has no origin."""
    try:
        client_host = httpx2.URL(url).raw_host.decode()
    except httpx2.InvalidURL:
        with pytest.raises(ValueError, match=r"Codepoint|Joiner"):
            origin(url)
    else:
        assert origin(url)[1] == client_host.lower()


@pytest.mark.parametrize("url", ["https://./", "https://../x", f"https://{'a.' * 127}a/", f"https://{'a' * 64}\u00e9/"])
def test_invalid_host_names_are_refused(url: str) -> None:
    """Host names that are empty or too long are refused."""
    with pytest.raises(ValueError, match=r"(?i)name|label"):
        origin(url)


@pytest.mark.parametrize(
    "url",
    [
        *("https://evil.test\\.far.test/", "https://evil.test%2f.far.test/", "https://evil.test .far.test/"),
        *("https://evil.test;.far.test/", "https://far.test:0/", "https://[::1]evil.test/"),
    ],
)
def test_hosts_that_parsers_read_differently_are_refused(url: str) -> None:
    """A URL is refused if HTTP clients and proxies could read different hosts or ports in it."""
    with pytest.raises(ValueError, match=r"host|port|address|URL"):
        origin(url)


def test_a_trailing_dot_names_the_same_host() -> None:
    """`far.test.` is the same host as `far.test`, in a URL and in the settings."""
    assert origin("https://FAR.test.:444/x") == ("https", "far.test", 444)
    settings = Upstream.model_validate(
        {"name": "far.test", "redirects": ["cdn.test.:9"], "realms": ["https://a.test./t"]}
    )
    assert settings.redirect_host_ports == {("cdn.test", 9)}
    assert settings.realm_host_ports == {("a.test", 443)}


def test_a_redirect_to_another_origin_loses_authorization() -> None:
    """The header Authorization is dropped on a redirect to another host, port or scheme. A later redirect back does not
    restore the header."""
    for target in ("https://other.test/", "https://far.test:444/", "//other.test/"):
        route = RedirectChain("https://far.test/v2/", {"Authorization": "x", "Range": "bytes=1-"})
        assert route.follow(307, target)
        assert route.is_cross_origin
        assert route.headers == {"Range": "bytes=1-"}
        assert route.follow(307, "https://far.test/v2/")
        assert not route.is_cross_origin
        assert "Authorization" not in route.headers
    for target in ("/x", "https://far.test:443/x", "https://user:pw@FAR.test/x"):
        route = RedirectChain("https://far.test/v2/", {"Authorization": "x"})
        assert route.follow(302, target)
        assert route.headers == {"Authorization": "x"}
        assert "pw" not in route.url


def test_a_redirect_to_a_long_address_is_refused() -> None:
    """A redirect to a URL of more than 8192 characters is refused. Parsing such a URL would block the event loop."""
    route = RedirectChain("https://far.test/", {})
    with pytest.raises(UpstreamUnavailable, match="address of more than 8192 characters"):
        route.follow(307, "/" + "x/../" * 12000)
    assert route.follow(307, "/" + "x" * 8000)


def test_a_long_link_is_refused() -> None:
    """A `Link` of more than 8192 characters raises an error. Otherwise the list would be incomplete without notice."""
    with pytest.raises(UpstreamUnavailable, match="Link of more than 8192 characters"):
        next_page_url({"link": f"</{'x' * 60000}>; rel=next"}, URL)


def test_a_redirect_from_https_to_http_is_refused() -> None:
    """A redirect from https to http is refused."""
    with pytest.raises(UpstreamUnavailable, match="from https to http"):
        RedirectChain("https://far.test/", {}).follow(307, "http://far.test/")
    assert not RedirectChain("https://far.test/", {}).follow(200, "http://far.test/")


@pytest.mark.parametrize(
    ("url", "no_proxy", "proxy"),
    [
        ("https://far.test/", "", "http://secure.test:3129"),
        ("http://far.test/", "", "http://plain.test:3128"),
        ("http://localhost:5000/", "", None),
        ("http://127.0.0.1:5000/", "", None),
        ("http://[::1]:5000/", "", None),
        ("http://far.test/", "*", None),
        ("http://far.test/", "other.test, far.test", None),
        ("http://a.far.test/", ".far.test", None),
        ("http://a.far.test/", "*.far.test", None),
        ("http://notfar.test/", "far.test", "http://plain.test:3128"),
        ("http://far.test:81/", "far.test:81", None),
        ("http://far.test:82/", "far.test:81", "http://plain.test:3128"),
        ("http://10.1.2.3/", "10.0.0.0/8", None),
        ("http://11.1.2.3/", "10.0.0.0/8", "http://plain.test:3128"),
        ("http://10.1.2.3/", "10.1.2.3", None),
        ("http://10.1.2.3:81/", "10.1.2.3:81,nonsense/99", None),
    ],
)
def test_proxies(monkeypatch: pytest.MonkeyPatch, url: str, no_proxy: str, proxy: str | None) -> None:
    """The scheme of the URL selects the proxy. No proxy is used for hosts in NO_PROXY and for loopback addresses."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "ALL_PROXY", "REQUEST_METHOD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", "plain.test:3128")
    monkeypatch.setenv("HTTPS_PROXY", "http://secure.test:3129")
    monkeypatch.setenv("NO_PROXY", no_proxy)
    assert OutboundProxies().proxy_for(url) == proxy


def test_unsupported_proxy_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy with an unsupported scheme raises an error, so that no request bypasses the proxy."""
    monkeypatch.delenv("http_proxy", raising=False)
    monkeypatch.setenv("HTTP_PROXY", "socks5://proxy.test:1080")
    with pytest.raises(UpstreamUnavailable, match="socks5"):
        OutboundProxies().proxy_for("http://far.test/")
