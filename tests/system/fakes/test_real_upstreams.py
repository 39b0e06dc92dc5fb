"""Tests of the real registries that other tests use as upstreams: they serve the content that was pushed to them, and a
proxy can make them slow or add TLS."""

from __future__ import annotations

import hashlib
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from tests.fakes.certificate_authority import certificates
from tests.fakes.client_images import MIB
from tests.fakes.hub.hub import hub
from tests.fakes.real_upstreams import docker_registry, entrepot, slow_link
from tests.fakes.upstream_content import ImageTree, UpstreamContent, noise_image, ubuntu

REPO = "library/app"


@pytest.fixture
def content() -> UpstreamContent:
    made = UpstreamContent()
    made.add(REPO, noise_image("app", 1000, 3 * MIB), "1")
    made.add("library/ubuntu", ubuntu(), "18.04")
    return made


@pytest.fixture
def client() -> Iterator[httpx2.Client]:
    with httpx2.Client(trust_env=False, timeout=30) as made:
        yield made


def check(client: httpx2.Client, url: str, content: UpstreamContent) -> None:
    """Checks that the registry at `url` serves every manifest, by tag and by digest, and every blob with the right
    bytes."""
    for repo, repository_content in content.repositories.items():
        for reference in (*repository_content.manifests, *repository_content.tags):
            body, media_type = repository_content.manifests[repository_content.tags.get(reference, reference)]
            got = client.get(f"{url}/v2/{repo}/manifests/{reference}", headers={"Accept": media_type})
            assert (got.status_code, got.headers["Content-Type"], got.content) == (200, media_type, body)
        for digest in repository_content.blobs:
            got = client.get(f"{url}/v2/{repo}/blobs/{digest}")
            assert "sha256:" + hashlib.sha256(got.content).hexdigest() == digest


def test_docker_registry_serves_pushed_content(tmp_path: Path, client: httpx2.Client, content: UpstreamContent) -> None:
    """Debian's docker-registry serves images in the formats of docker and OCI. After it is stopped, its port refuses
    connections."""
    with docker_registry(tmp_path, content) as far:
        check(client, far.url, content)
        far.stop()
        with pytest.raises(httpx2.ConnectError):
            client.get(f"{far.url}/v2/")


def test_docker_registry_as_a_mirror_of_the_fake_hub(
    tmp_path: Path, client: httpx2.Client, content: UpstreamContent
) -> None:
    """docker-registry can be a mirror of the fake Docker Hub. So the fake Hub works with a client that was made for the
    real one: with tokens, with a token service at another host, and with redirects to a port that refuses tokens."""
    with hub(tmp_path, content, auth="bearer", redirects=True, limit=100) as upstream:
        upstream.set(realm=f"{upstream.auth_url}/token")
        with docker_registry(tmp_path, remote=upstream.url) as proxy:
            check(client, proxy.url, content)
        assert upstream.count("token") > 0
        assert not [request for request in upstream.requests("blob") if request.authorization]


def test_entrepot_serves_pushed_content(tmp_path: Path, client: httpx2.Client, content: UpstreamContent) -> None:
    """Entrepot itself can be the upstream in a test, and serves the pushed content."""
    with entrepot(tmp_path, content) as url:
        check(client, url, content)


def test_link_with_tls(tmp_path: Path, client: httpx2.Client, content: UpstreamContent) -> None:
    """With TLS in front of an upstream, a client that trusts the authority gets all content. Another client fails."""
    made = certificates(tmp_path)
    with hub(tmp_path, content) as upstream, slow_link(tmp_path, upstream.url, certificates=made) as link:
        assert link.url.startswith("https://")
        with httpx2.Client(trust_env=False, verify=ssl.create_default_context(cafile=made.authority)) as trusting:
            check(trusting, link.url, content)
        with pytest.raises(httpx2.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            client.get(f"{link.url}/v2/")


def test_a_slow_link(tmp_path: Path, client: httpx2.Client) -> None:
    """nginx in front of an upstream limits the rate of each response, and changes no byte."""
    content = UpstreamContent()
    image: ImageTree = content.add(REPO, noise_image("slow", 3 * MIB), "1")
    with docker_registry(tmp_path, content) as far, slow_link(tmp_path, far.url, "4m") as link:
        check(client, link.url, content)
        started = time.monotonic()
        client.get(f"{link.url}/v2/{REPO}/blobs/{image.layers[0].digest}")
        # 3 MiB at 4 MiB/s. nginx measures in whole seconds, so the response may be much faster than the rate.
        assert time.monotonic() - started > 0.2
