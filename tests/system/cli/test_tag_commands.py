"""Tests of `entrepot tag` while a server runs: it shows the history of a tag, and restores, moves and deletes tags."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.fakes.commands import entrepot
from tests.fakes.plain_client import plain_request
from tests.fakes.server_process import RegistryServer, running_server

INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
SETTINGS = """
[gc]
grace = "1h"

[[immutable]]
repositories = "fixed/**"
tags = ["v*"]
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryServer]:
    """Runs a server with two workers. In its repositories below `fixed/`, tags that begin with `v` are immutable."""
    folder = tmp_path_factory.mktemp("tags")
    (folder / "entrepot.toml").write_text(SETTINGS)
    with running_server(folder, "--config", str(folder / "entrepot.toml"), workers=2) as started:
        yield started


@pytest.fixture
def repo(request: pytest.FixtureRequest) -> str:
    """Returns a repository name that only this test uses."""
    return "team/" + re.sub(r"[^a-z0-9]+", "-", request.node.name).strip("-")


def index(text: str) -> tuple[bytes, str]:
    """Returns the body and the digest of an index without manifests. The text is in an annotation, so that the digest
    depends on it."""
    document = {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": [], "annotations": {"text": text}}
    body = json.dumps(document).encode()
    return body, "sha256:" + hashlib.sha256(body).hexdigest()


def put(server: RegistryServer, name: str, tag: str, text: str) -> str:
    """Pushes the index with this text under the tag. Returns its digest."""
    body, digest = index(text)
    answer = plain_request(
        "PUT", f"{server.url}/v2/{name}/manifests/{tag}", content=body, headers={"content-type": INDEX_TYPE}
    )
    assert answer.status_code == 201, answer.text
    return digest


def delete(server: RegistryServer, name: str, reference: str) -> None:
    assert plain_request("DELETE", f"{server.url}/v2/{name}/manifests/{reference}").status_code == 202


def head(server: RegistryServer, name: str, tag: str) -> str | None:
    """Returns the digest at which the tag points, or None if the tag does not exist."""
    answer = plain_request("HEAD", f"{server.url}/v2/{name}/manifests/{tag}", headers={"accept": INDEX_TYPE})
    return answer.headers.get("docker-content-digest")


def run(server: RegistryServer, *args: str, code: int = 0) -> str:
    """Runs `entrepot tag`, and checks its exit code. Returns its stdout, or its stderr if the code is not 0."""
    folder = server.data.parent
    result = entrepot("tag", *args, "--config", "entrepot.toml", folder=folder)
    assert result.returncode == code, (result.stdout, result.stderr)
    return result.stderr if code else result.stdout


def test_restore_of_an_overwritten_tag(server: RegistryServer, repo: str) -> None:
    """The history shows that a tag was overwritten. `restore` lets the tag point at the earlier image again, and both
    workers serve this image at once."""
    first, second = put(server, repo, "v1", "first"), put(server, repo, "v1", "second")
    table = run(server, "history", f"{repo}:v1").splitlines()
    assert re.split(r"\s{2,}", table[0].strip()) == ["time", "tag", "points at", "actor", "address", "can be restored"]
    rows = [re.split(r"\s{2,}", line.strip()) for line in table[2:]]
    assert [row[1:] for row in rows] == [["v1", digest, "anonymous", "127.0.0.1", "yes"] for digest in (second, first)]
    assert run(server, "restore", f"{repo}:v1") == f"{repo}:v1 points at {first} now; before, it pointed at {second}\n"
    for _ in range(6):  # often enough to reach both workers
        assert head(server, repo, "v1") == first
    newest = json.loads(run(server, "history", repo, "--limit", "1", "--json"))[0]
    assert newest["actor"].startswith("cli:")
    assert (newest["digest"], newest["previous"], newest["availability"]) == (first, second, "stored")


def test_restore_of_a_deleted_image(server: RegistryServer, repo: str) -> None:
    """If a manifest was deleted, `restore` restores the tag together with the manifest."""
    digest = put(server, repo, "v1", "first")
    delete(server, repo, digest)
    assert head(server, repo, "v1") is None
    rows = run(server, "history", f"{repo}:v1").splitlines()[2:]
    assert "(deleted)" in rows[0]
    assert rows[1].endswith("yes, it was deleted")
    output = json.loads(run(server, "restore", f"{repo}:v1", "--json"))
    assert output == {"repository": repo, "tag": "v1", "digest": digest, "previous": None, "restored": [digest]}
    assert head(server, repo, "v1") == digest


def test_restore_at_a_point_in_time(server: RegistryServer, repo: str) -> None:
    """`restore --at` accepts a time, or a duration before now, and restores the image at which the tag pointed then."""
    first = put(server, repo, "v1", "first")
    between = datetime.fromtimestamp(time.time()).isoformat()
    put(server, repo, "v1", "second")
    run(server, "restore", f"{repo}:v1", "--at", between)
    assert head(server, repo, "v1") == first
    entries = json.loads(run(server, "history", repo, "--json"))
    assert len(entries) == 3
    run(server, "restore", f"{repo}:v1", "--at", entries[1]["at"])  # the time that the history shows
    assert head(server, repo, "v1") == entries[1]["digest"]
    output = run(server, "restore", f"{repo}:v1", "--at", "1h", code=1)
    assert output == f"entrepot: {repo}:v1 did not exist at that time; the tag's history shows when it existed\n"


def test_move_and_delete(server: RegistryServer, repo: str) -> None:
    """`move` lets a tag point at the image of another tag or at a digest. `delete` deletes a tag and keeps its
    manifest."""
    first, second = put(server, repo, "v1", "first"), put(server, repo, "v2", "second")
    created = run(server, "move", f"{repo}:stable", "v1")
    assert created == f"{repo}:stable points at {first} now; before, there was no such tag\n"
    assert run(server, "move", f"{repo}:stable", second).endswith(
        f"points at {second} now; before, it pointed at {first}\n"
    )
    assert run(server, "move", f"{repo}:stable", "v2") == f"{repo}:stable points at {second} already\n"
    assert run(server, "delete", f"{repo}:stable") == f"deleted {repo}:stable; its manifest stays\n"
    assert head(server, repo, "stable") is None
    run(server, "restore", f"{repo}:stable")
    assert head(server, repo, "stable") == second


def test_an_immutable_tag(server: RegistryServer, repo: str) -> None:
    """Clients and commands cannot change an immutable tag. `move --force` can, and the audit log has an entry for
    this."""
    repo = repo.replace("team/", "fixed/")
    first, second = put(server, repo, "v1", "first"), put(server, repo, "latest", "second")
    put(server, repo, "v1", "first")
    url = f"{server.url}/v2/{repo}/manifests"
    headers = {"content-type": INDEX_TYPE}
    refused = [
        plain_request("PUT", f"{url}/v1", content=index("second")[0], headers=headers),
        plain_request("PUT", f"{url}/latest?tag=v1", content=index("second")[0], headers=headers),
        plain_request("DELETE", f"{url}/v1"),
        plain_request("DELETE", f"{url}/{first}"),
    ]
    assert [answer.status_code for answer in refused] == [403] * 4
    [error] = refused[0].json()["errors"]
    assert (error["code"], error["message"]) == (
        "DENIED", f"{repo}:v1 is immutable and points at {first}; push another tag",
    )  # fmt: skip
    for change in (("move", f"{repo}:v1", "latest"), ("delete", f"{repo}:v1")):
        assert f"{repo}:v1 is immutable" in run(server, *change, code=1)
    run(server, "move", f"{repo}:v1", "latest", "--force")
    assert head(server, repo, "v1") == second
    lines: list[dict[str, Any]] = json.loads(
        entrepot("audit", "--target", f"{repo}:v1", "--json", folder=server.data.parent).stdout
    )
    assert ["tag.force", {"previous": first}] in [[line["action"], line["detail"]] for line in lines]


def test_one_of_many_parallel_pushes_sets_an_immutable_tag(server: RegistryServer, repo: str) -> None:
    """Several clients push different images to a new immutable tag at the same time, through two workers. One push
    succeeds, and all others are denied."""
    url = f"{server.url}/v2/{repo.replace('team/', 'fixed/')}/manifests/v1"

    def push(number: int) -> httpx2.Response:
        return plain_request("PUT", url, content=index(f"number {number}")[0], headers={"content-type": INDEX_TYPE})

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(push, range(48)))
    assert sorted({answer.status_code for answer in answers}) == [201, 403]
    [accepted] = [answer.headers["docker-content-digest"] for answer in answers if answer.status_code == 201]
    assert plain_request("GET", url, headers={"accept": INDEX_TYPE}).headers["docker-content-digest"] == accepted


@pytest.mark.parametrize(
    ("args", "code", "error"),
    [
        (["history", "never/was"], 1, "there is no repository never/was"),
        (["restore", "never/was:v1"], 1, "there is no repository never/was"),
        (["restore", "team/app"], 2, "team/app names no tag; write team/app:TAG"),
        (["move", "localhost:5000/app", "v1"], 1, "'localhost:5000/app' is not a repository name"),
        (
            ["history", "team/app@sha256:00"],
            2,
            "team/app@sha256:00 has a digest; give a tag instead, such as team/app:v1",
        ),
        (["history", "team/app:-"], 1, "'-' is not a tag"),
        (["move", "team/app:v1", "sha256:00"], 1, "'sha256:00' is not a digest"),
        (["restore", "team/app:v1", "--to", "v1"], 1, "'v1' is not a digest"),
        (["restore", "team/app:v1", "--to", "v1", "--at", "2h"], 2, "--to and --at contradict each other"),
        (["restore", "team/app:v1", "--at", "noon"], 2, "--at: 'noon' is neither a time like 2026-11-28T09:30 nor"),
    ],
)
def test_bad_usage(server: RegistryServer, args: list[str], code: int, error: str) -> None:
    """For wrong usage, the error is one line that says what is wrong."""
    output = run(server, *args, code=code)
    assert error in output
    assert output.startswith("entrepot: ")
    assert output.count("\n") == 1


def test_tag_of_a_mirrored_repository_cannot_be_moved(server: RegistryServer) -> None:
    """A tag of a mirrored repository cannot be moved."""
    result = entrepot(
        *("tag", "move", "docker.io/library/x:1", "2", "--data", str(server.data)),
        folder=server.data.parent,
        ENTREPOT_MIRROR="docker.io",
    )
    assert result.returncode == 1
    assert result.stderr == (
        "entrepot: docker.io/library/x is mirrored from docker.io, and its tags follow that registry\n"
    )


def test_history_of_a_tag_that_never_existed(server: RegistryServer, repo: str) -> None:
    """The history of a tag that never existed is empty, and stderr says so."""
    body, digest = index("untagged")
    plain_request(
        "PUT", f"{server.url}/v2/{repo}/manifests/{digest}", content=body, headers={"content-type": INDEX_TYPE}
    )
    result = entrepot("tag", "history", f"{repo}:v1", "--config", "entrepot.toml", folder=server.data.parent)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", f"entrepot: {repo} never had a tag v1\n")


@pytest.mark.parametrize(
    ("rule", "error"),
    [
        ('repositories = "team/**"', "immutable[1].tags: is missing"),
        ('repositories = "team/**"\ntags = "v/*"', "'v/*' is not a pattern of tags, such as v* or *-nightly"),
        ('repositories = "Team/**"\ntags = "v*"', "'Team/**' is not a pattern of names, such as team/** or *"),
        ('repository = "team/**"\ntags = "v*"', "repositories"),
        ('repositories = "ghcr.io/**"\ntags = "v*"', "'ghcr.io/**' is mirrored from ghcr.io"),
    ],
)
def test_bad_rules(tmp_path: Path, rule: str, error: str) -> None:
    """If the settings have an invalid rule for immutable tags, the server does not start, and the error says what is
    wrong."""
    (tmp_path / "bad.toml").write_text(f'mirror = ["ghcr.io"]\n[[immutable]]\n{rule}\n')
    result = entrepot("serve", "--config", "bad.toml", folder=tmp_path)
    assert result.returncode == 2
    assert error in result.stderr
