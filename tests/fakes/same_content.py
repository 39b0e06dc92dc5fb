"""Compares the content of two running registries: every tag, every manifest below it, and every blob, byte by byte."""

from __future__ import annotations

import json

from tests.fakes.client_images import digests_in
from tests.fakes.clients.registry_client import RegistryClient


def catalog(wire: RegistryClient) -> list[str]:
    """Returns the names of all repositories that have a manifest."""
    reply = wire.ask("GET", "/v2/_catalog?n=1000")
    assert reply.status == 200, reply.body
    return sorted(json.loads(reply.body)["repositories"])


def tags(wire: RegistryClient, repo: str) -> list[str]:
    """Returns the tags of a repository; empty if it has none."""
    reply = wire.ask("GET", f"/v2/{repo}/tags/list")
    return sorted(json.loads(reply.body)["tags"] or []) if reply.status == 200 else []


def assert_same_content(old: RegistryClient, new: RegistryClient) -> int:
    """Checks that every repository of `old` with tags is the same in `new`. Returns the numbers of manifests and
    blobs."""
    names = [repo for repo in catalog(old) if tags(old, repo)]
    assert names == catalog(new)
    seen: set[tuple[str, str]] = set()
    for repo in names:
        assert tags(old, repo) == tags(new, repo)
        for tag in tags(old, repo):
            assert_same_manifest(old, new, repo, tag, seen)
    return len(seen)


def assert_same_manifest(
    old: RegistryClient, new: RegistryClient, repo: str, reference: str, seen: set[tuple[str, str]]
) -> None:
    """Checks that a manifest and everything below it is the same. `seen`: the digests that were compared already."""
    if (repo, reference) in seen:
        return
    seen.add((repo, reference))
    was, now = old.manifest(repo, reference), new.manifest(repo, reference)
    assert (was.body, was.headers["Content-Type"]) == (now.body, now.headers["Content-Type"])
    assert was.headers["Docker-Content-Digest"] == now.headers["Docker-Content-Digest"]
    for digest, _, is_manifest in digests_in(was.body):
        if is_manifest:
            assert_same_manifest(old, new, repo, digest, seen)
        elif (repo, digest) not in seen:
            seen.add((repo, digest))
            assert old.blob(repo, digest) == new.blob(repo, digest)
