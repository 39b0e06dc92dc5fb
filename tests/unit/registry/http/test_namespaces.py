"""A mirror's clients name the upstream by the query parameter `ns` or by the Host header."""

from __future__ import annotations

from urllib.parse import urlsplit

import pytest

from registry.http import DistributionAPI, Namespaces
from registry.http.namespaces import hosts_of
from registry.naming import NamingRules
from registry.observe import Observed
from registry.request import set_notice
from registry.router import Router
from storage.content import Descriptor, Manifest, Page
from storage.errors import NameUnknown
from storage.memory_registry import MemoryRegistry
from storage.names import Digest, Reference, RepositoryName, Tag
from storage.wrappers import ForwardingRegistry
from tests.fakes.asgi_client import AsgiClient
from tests.unit.registry.conftest import put_blob, put_image

HUB = "docker.io/library/ubuntu"
PUBLIC = "https://registry.example.com"
ALIASES = {"registry.corp:5000": "ghcr.io", "registry.corp": "docker.io"}
"""Other values of `ns`, and the upstream of each."""
HOSTS = {"hub.example.com": "docker.io", "ghcr.example.com:8080": "ghcr.io"}
"""Host names of this registry. A request to one of them is for the upstream that is given here."""


async def exists(registry: MemoryRegistry, repo: RepositoryName) -> bool:
    try:
        await registry.tags(repo, None, 1)
    except NameUnknown:
        return False
    return True


def client_of(registry: MemoryRegistry) -> AsgiClient:
    """Returns a client of a registry with two mirrors. `registry` has the hosted content, and that of both mirrors: a
    mirrored repository is one whose name begins with the upstream's name."""
    naming = NamingRules(("docker.io", "ghcr.io"), default="docker.io")
    router = Router(registry, {"docker.io": registry, "ghcr.io": registry}, lambda repo: exists(registry, repo), naming)
    namespaces = Namespaces(naming, HOSTS, hosts_of(PUBLIC), ALIASES)
    return AsgiClient(DistributionAPI(Observed(router), namespaces=namespaces))


@pytest.fixture
def client(registry: MemoryRegistry) -> AsgiClient:
    return client_of(registry)


PATHS = ["manifests/1", "manifests/{digest}", "blobs/{blob}", "tags/list", "referrers/{digest}"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("name", "query"),
    [
        ("library/ubuntu", "?ns=docker.io"),
        ("ubuntu", "?ns=docker.io"),
        ("docker.io/library/ubuntu", "?ns=docker.io"),
        ("library/ubuntu", "?ns=DOCKER.IO"),
    ],
)
async def test_ns_names_the_upstream(
    client: AsgiClient, registry: MemoryRegistry, path: str, name: str, query: str
) -> None:
    """With `ns`, each endpoint serves the upstream's repository."""
    image = await put_image(registry, "1", repo=HUB)
    blob = await put_blob(registry, b"{}", HUB)
    for method in ("GET", "HEAD"):
        target = f"/v2/{name}/{path.format(digest=image.digest, blob=blob)}{query}"
        answer = await client(method, target)
        assert (answer.status, answer["oci-namespace"]) == (200, "docker.io")


async def test_ns_separates_names(client: AsgiClient, registry: MemoryRegistry) -> None:
    """For each `ns`, the same path names another repository. Without `ns`, it names the hosted repository."""
    images = {}
    for ns, repo in (("docker.io", "docker.io/team/app"), ("ghcr.io", "ghcr.io/team/app"), ("", "team/app")):
        images[ns] = await put_image(registry, "1", repo=repo, annotations={"ns": ns})
    for ns, image in images.items():
        answer = await client("HEAD", f"/v2/team/app/manifests/1?ns={ns}")
        assert answer["docker-content-digest"] == image.digest
        assert answer.all("oci-namespace") == ([ns] if ns else [])


async def test_ns_may_be_an_alias(client: AsgiClient, registry: MemoryRegistry) -> None:
    """`ns` may be an alias of an upstream. The response and the links to further pages keep the alias."""
    for repo in ("docker.io/team/app", "ghcr.io/team/app"):
        for tag in ("1", "2"):
            await put_image(registry, tag, repo=repo, annotations={"repo": repo})
    for ns, repo in ALIASES.items():
        name = f"{repo}/team/app"
        answer = await client("GET", f"/v2/team/app/manifests/1?ns={ns.upper()}")
        assert (answer.status, answer["oci-namespace"]) == (200, ns)
        assert answer.json["annotations"] == {"repo": name}
        answer = await client("GET", f"/v2/team/app/tags/list?n=1&ns={ns}")
        assert answer.json == {"name": "team/app", "tags": ["1"]}
        answer = await client("GET", answer["link"].partition("<")[2].partition(">")[0])
        assert answer.json == {"name": "team/app", "tags": ["2"]}


async def test_an_unknown_ns_is_404(client: AsgiClient, registry: MemoryRegistry) -> None:
    """An unknown `ns` gets 404 NAME_UNKNOWN. The error does not tell which upstreams are mirrored."""
    await put_image(registry, "1", repo="team/app")
    for ns in ("quay.io", "http://169.254.169.254", "docker.io/library", "ghcr.io:443", "registry.corp:80", "x" * 300):
        answer = await client("GET", f"/v2/team/app/manifests/1?ns={ns}")
        assert (answer.status, answer.code) == (404, "NAME_UNKNOWN")
        assert "ghcr.io" not in answer.json["errors"][0]["message"].replace("ghcr.io:443", "")
        assert "oci-namespace" not in answer


async def test_two_ns_are_refused(client: AsgiClient) -> None:
    """A request with two `ns` is refused."""
    answer = await client("GET", "/v2/team/app/manifests/1?ns=docker.io&ns=ghcr.io")
    assert (answer.status, answer.code) == (400, "UNSUPPORTED")


@pytest.mark.parametrize(
    ("host", "ns"),
    [
        ("localhost:5000", "localhost:5000"),
        ("localhost:5000", "localhost"),
        ("LOCALHOST:5000", "localhost:5000"),
        ("127.0.0.1:5000", "registry.example.com"),
        ("[::1]:5000", "[::1]:5000"),
        ("localhost:5000", ""),
    ],
)
async def test_ns_of_this_server_is_ignored(client: AsgiClient, registry: MemoryRegistry, host: str, ns: str) -> None:
    """`ns` is ignored if it is the Host of the request or the host in `public_url`."""
    await put_image(registry, "1", repo="team/app")
    answer = await client("GET", f"/v2/team/app/manifests/1?ns={ns}", {"Host": host})
    assert answer.status == 200
    assert "oci-namespace" not in answer
    answer = await client("POST", f"/v2/team/app/blobs/uploads/?ns={ns}", {"Host": host})
    assert (answer.status, "ns=" in answer["location"]) == (202, False)


async def test_pushes_under_ns_are_denied(client: AsgiClient, registry: MemoryRegistry) -> None:
    """A push with `ns` gets 403, even if the name is hosted here without `ns`."""
    await put_image(registry, "1", repo="team/app")
    blob = await put_blob(registry, b"{}", "team/app")
    for method, path in (
        ("POST", "blobs/uploads/"),
        ("POST", f"blobs/uploads/?mount={blob}&from=team/app"),
        ("PUT", "manifests/2"),
    ):
        target = f"/v2/team/app/{path}{'&' if '?' in path else '?'}ns=docker.io"
        body = (await registry.get_manifest(RepositoryName("team/app"), (await _tag(registry)))).body
        answer = await client(method, target, body=body if method == "PUT" else b"")
        assert (answer.status, answer.code) == (403, "DENIED")
        assert "docker.io/team/app is mirrored from docker.io" in answer.json["errors"][0]["message"]


async def _tag(registry: MemoryRegistry) -> Reference:
    return (await registry.tags(RepositoryName("team/app"), None, 1)).items[0]


async def test_deletes_under_ns_delete_the_cached_copy(client: AsgiClient, registry: MemoryRegistry) -> None:
    """A DELETE with `ns` gets 202 and deletes the mirror's copy."""
    await put_image(registry, "1", repo=HUB)
    assert (await client("DELETE", "/v2/library/ubuntu/manifests/1?ns=docker.io")).status == 202
    assert (await client("GET", "/v2/library/ubuntu/manifests/1?ns=docker.io")).status == 404


async def test_lists_keep_the_name_and_ns_of_the_client(client: AsgiClient, registry: MemoryRegistry) -> None:
    """The Link header of a list keeps `ns` and the name that the client used."""
    for tag in "abc":
        await put_image(registry, tag, repo=HUB)
    target, listed_tags = "/v2/ubuntu/tags/list?n=1&ns=docker.io", []
    while target:
        answer = await client("GET", target)
        assert answer.json["name"] == "ubuntu"
        listed_tags += answer.json["tags"]
        target = answer["link"].partition(">")[0].removeprefix("<") if "link" in answer else ""
    assert listed_tags == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("host", "path"),
    [
        ("hub.example.com", "library/ubuntu"),
        ("hub.example.com:5000", "ubuntu"),
        ("HUB.example.com", "docker.io/ubuntu"),
    ],
)
async def test_a_host_name_stands_for_an_upstream(
    client: AsgiClient, registry: MemoryRegistry, host: str, path: str
) -> None:
    """A request to a host name in `HOSTS` is for its upstream. If `HOSTS` has no port for it, any port matches."""
    image = await put_image(registry, "1", repo=HUB)
    answer = await client("GET", f"/v2/{path}/manifests/1", {"Host": host})
    assert (answer.status, answer["docker-content-digest"]) == (200, image.digest)
    assert "oci-namespace" not in answer


async def test_a_host_with_a_port_does_not_match_other_ports(client: AsgiClient, registry: MemoryRegistry) -> None:
    """If `HOSTS` has a port for a host name, other ports do not match."""
    image = await put_image(registry, "1", repo="ghcr.io/org/app")
    answer = await client("HEAD", "/v2/org/app/manifests/1", {"Host": "ghcr.example.com:8080"})
    assert answer["docker-content-digest"] == image.digest
    assert (await client("HEAD", "/v2/org/app/manifests/1", {"Host": "ghcr.example.com:5000"})).status == 404


async def test_ns_has_precedence_over_the_host(client: AsgiClient, registry: MemoryRegistry) -> None:
    """`ns` has precedence over the host."""
    hub = await put_image(registry, "1", repo="docker.io/org/app")
    ghcr = await put_image(registry, "1", repo="ghcr.io/org/app", annotations={"of": "ghcr"})
    host = {"Host": "hub.example.com"}
    answer = await client("HEAD", "/v2/org/app/manifests/1?ns=ghcr.io", host)
    assert answer["docker-content-digest"] == ghcr.digest
    answer = await client("HEAD", "/v2/org/app/manifests/1?ns=hub.example.com", host)
    assert answer["docker-content-digest"] == hub.digest


async def test_pushes_to_a_host_name_for_an_upstream_are_denied(client: AsgiClient) -> None:
    """A push to a host name in `HOSTS` is denied."""
    answer = await client("POST", "/v2/team/app/blobs/uploads/", {"Host": "hub.example.com"})
    assert (answer.status, answer.code) == (403, "DENIED")


async def test_a_name_that_is_too_long_with_its_upstream_is_400(client: AsgiClient) -> None:
    """The limit for the length of a repository name includes the upstream's name."""
    answer = await client("GET", f"/v2/{'a' * 250}/manifests/1?ns=docker.io")
    assert (answer.status, answer.code) == (400, "NAME_INVALID")


async def test_ping_and_catalog_accept_any_ns(client: AsgiClient) -> None:
    """Requests that name no repository accept any `ns`."""
    for path in ("/v2/", "/v2/_catalog"):
        assert (await client("GET", f"{path}?ns=quay.io")).status == 200


async def test_ns_is_ignored_without_upstreams(registry: MemoryRegistry) -> None:
    """If nothing is mirrored, `ns` is ignored."""
    await put_image(registry, "1", repo="team/app")
    answer = await AsgiClient(DistributionAPI(registry))("GET", "/v2/team/app/manifests/1?ns=quay.io")
    assert answer.status == 200
    assert "oci-namespace" not in answer


async def test_location_keeps_ns(registry: MemoryRegistry) -> None:
    """A Location header keeps `ns`."""
    client = AsgiClient(DistributionAPI(registry, namespaces=Namespaces(NamingRules(["docker.io"]))))
    location = urlsplit((await client("POST", "/v2/team/app/blobs/uploads/?ns=docker.io"))["location"])
    assert location.path.startswith("/v2/team/app/blobs/uploads/")
    assert location.query == "ns=docker.io"
    assert (await client("GET", f"{location.path}?{location.query}")).status == 204
    assert (await client("GET", location.path)).status == 404


class WarningRegistry(ForwardingRegistry):
    """A registry that sets `notice` for tags and referrers. For manifests, only a read of the tag `stale` sets it."""

    def __init__(self, inner: MemoryRegistry, notice: str) -> None:
        super().__init__(inner)
        self.notice = notice

    async def get_manifest(self, repo: RepositoryName, reference: Reference) -> Manifest:
        if reference == "stale":
            set_notice(self.notice)
        return await super().get_manifest(repo, reference)

    async def resolve_manifest(self, repo: RepositoryName, reference: Reference) -> Descriptor:
        return (await self.get_manifest(repo, reference)).descriptor

    async def tags(self, repo: RepositoryName, after: str | None, limit: int) -> Page[Tag]:
        set_notice(self.notice)
        return await super().tags(repo, after, limit)

    async def referrers(
        self, repo: RepositoryName, subject: Digest, artifact_type: str | None, after: str | None, limit: int
    ) -> Page[Descriptor]:
        set_notice(self.notice)
        return await super().referrers(repo, subject, artifact_type, after, limit)


@pytest.mark.parametrize(
    ("notice", "header"),
    [
        ("docker.io cannot be reached; as of 12:00", '299 - "docker.io cannot be reached; as of 12:00"'),
        ('a "quoted" \\ word', '299 - "a \\"quoted\\" \\\\ word"'),
        ("line\r\nbreak: é", '299 - "line  break: ?"'),
    ],
)
async def test_a_notice_is_sent_as_a_warning_header(registry: MemoryRegistry, notice: str, header: str) -> None:
    """A notice is sent in one Warning header. The next response, without a notice, has no Warning."""
    image = await put_image(registry, "stale", "fresh", repo=HUB)
    api = DistributionAPI(WarningRegistry(registry, notice), namespaces=Namespaces(NamingRules(["docker.io"])))
    client = AsgiClient(api)
    for method, headers, status in (
        ("GET", {}, 200),
        ("HEAD", {}, 200),
        ("GET", {"If-None-Match": f'"{image.digest}"'}, 304),
        ("HEAD", {"If-None-Match": f'"{image.digest}"'}, 304),
    ):
        answer = await client(method, f"/v2/{HUB}/manifests/stale", headers)
        assert (answer.status, answer["warning"]) == (status, header)
        assert "warning" not in await client(method, f"/v2/{HUB}/manifests/fresh", headers)
    for path in ("tags/list", f"referrers/{image.digest}"):
        assert (await client("GET", f"/v2/{HUB}/{path}"))["warning"] == header


async def test_a_long_notice_is_cut(registry: MemoryRegistry) -> None:
    """A long notice is cut, because the spec allows at most 4096 bytes of warnings."""
    await put_image(registry, "stale", repo=HUB)
    api = DistributionAPI(WarningRegistry(registry, '"' * 9000), namespaces=Namespaces(NamingRules(["docker.io"])))
    answer = await AsgiClient(api)("GET", f"/v2/{HUB}/manifests/stale")
    assert len(answer["warning"]) < 4096
