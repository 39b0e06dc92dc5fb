"""Compares the content of two running registries byte by byte: all tags, and all manifests and blobs to which the tags
lead."""

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
    """Checks that each repository with tags has the same content in `old` and `new`. Returns how many manifests and
    blobs were compared."""
    names = [repo for repo in catalog(old) if tags(old, repo)]
    assert names == catalog(new)
    compared: set[tuple[str, str]] = set()
    for repo in names:
        assert tags(old, repo) == tags(new, repo)
        for tag in tags(old, repo):
            assert_same_manifest(old, new, repo, tag, compared)
    return len(compared)


def assert_same_manifest(
    old: RegistryClient, new: RegistryClient, repo: str, reference: str, compared: set[tuple[str, str]]
) -> None:
    """Checks that a manifest, and all manifests and blobs to which it refers, are the same in both registries.
    `compared`: pairs of a repository and a digest or tag that were compared already; the function adds to it."""
    if (repo, reference) in compared:
        return
    compared.add((repo, reference))
    old_reply, new_reply = old.manifest(repo, reference), new.manifest(repo, reference)
    assert (old_reply.body, old_reply.headers["Content-Type"]) == (new_reply.body, new_reply.headers["Content-Type"])
    assert old_reply.headers["Docker-Content-Digest"] == new_reply.headers["Docker-Content-Digest"]
    for digest, _, is_manifest in digests_in(old_reply.body):
        if is_manifest:
            assert_same_manifest(old, new, repo, digest, compared)
        elif (repo, digest) not in compared:
            compared.add((repo, digest))
            assert old.blob(repo, digest) == new.blob(repo, digest)
