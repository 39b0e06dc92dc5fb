"""Tests of `entrepot mirror freeze`, `unfreeze` and `frozen`, and of the output of `status` and `refresh` about frozen
tags and cooldowns. A frozen tag stays at one digest. A cooldown delays the use of a new digest of a tag."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.commands import entrepot, entrepot_output, error_line, json_lines
from tests.fakes.hub.hub import Hub, hub
from tests.fakes.plain_client import plain_request
from tests.fakes.server_process import RegistryServer, running_server
from tests.fakes.upstream_content import ImageTree, UpstreamContent, index_of, noise_image

FIRST_IMAGE, SECOND_IMAGE = noise_image("first", 1000), noise_image("second", 1000)
SLOW_UPSTREAM = "docker.io is slow to answer"
"""A part of the warning if the mirror serves a cached tag because the upstream has not responded in a few seconds."""


@pytest.fixture
def upstream(tmp_path: Path) -> Iterator[Hub]:
    """Runs an upstream with one tag. Writes settings for a mirror of it into the folder of the test."""
    with hub(tmp_path, content_of(FIRST_IMAGE)) as running:
        configure(tmp_path, running)
        yield running


def content_of(image: ImageTree) -> UpstreamContent:
    content = UpstreamContent()
    content.add("library/app", image, "1")
    return content


def configure(folder: Path, upstream: Hub, more: str = "") -> None:
    (folder / "entrepot.toml").write_text(
        f'[[upstream]]\nname = "docker.io"\ndefault = true\nendpoints = ["{upstream.url}"]\ntag_ttl = "0s"\n{more}'
    )


def run_mirror(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Runs `entrepot mirror` with these arguments."""
    return entrepot("mirror", *args, "--config", "entrepot.toml", folder=folder)


def output_of(folder: Path, *args: str) -> list[str]:
    """Runs `entrepot mirror`, which must succeed without errors. Returns the lines of its output."""
    result = run_mirror(folder, *args)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout.splitlines()


def status(folder: Path) -> dict[str, Any]:
    """Returns the status of the upstream."""
    (upstream,) = json.loads("\n".join(output_of(folder, "status", "--json")))["upstreams"]
    assert isinstance(upstream, dict)
    return upstream


def served_digests(server: RegistryServer) -> set[tuple[str, str]]:
    """Returns the digests and warnings in the responses of the server. Sends so many requests that both workers get
    some. Repeats a request if the mirror has served the cached tag because the upstream did not respond in time."""
    found: set[tuple[str, str]] = set()
    for _ in range(12):
        warning = SLOW_UPSTREAM
        while SLOW_UPSTREAM in warning:
            answer = plain_request("HEAD", f"{server.url}/v2/app/manifests/1")
            warning = answer.headers.get("warning", "")
        found.add((answer.headers["docker-content-digest"], warning))
    return found


def test_freeze_while_a_server_runs(tmp_path: Path, upstream: Hub) -> None:
    """After `freeze`, all workers serve the tag at its digest, with a Warning header, and do not request the tag from
    the upstream. After `unfreeze`, they serve the digest that the upstream has."""
    with running_server(tmp_path, "--config", str(tmp_path / "entrepot.toml"), "--workers", "2") as server:
        assert served_digests(server) == {(FIRST_IMAGE.digest, "")}
        assert output_of(tmp_path, "freeze", "app:1") == [f"app:1: frozen at {FIRST_IMAGE.digest}"]
        upstream.put(content_of(SECOND_IMAGE))
        upstream.forget()
        ((digest, warning),) = served_digests(server)
        assert digest == FIRST_IMAGE.digest
        assert warning.startswith(f'299 - "docker.io/library/app:1 is frozen at {FIRST_IMAGE.digest} since 20')
        (message,) = output_of(tmp_path, "refresh", "app:1")
        assert message.startswith(f"app:1: frozen at {FIRST_IMAGE.digest} since 20")
        assert upstream.requests("manifest") == []
        assert status(tmp_path)["frozen"] == ["docker.io/library/app:1"]
        assert "1 tag frozen; to list them, run: entrepot mirror frozen" in output_of(tmp_path, "status")
        (message,) = output_of(tmp_path, "unfreeze", "app:1")
        assert message.startswith(f"app:1: no longer frozen; it was at {FIRST_IMAGE.digest} since 20")
        assert served_digests(server) == {(SECOND_IMAGE.digest, "")}


def test_freeze_at_a_digest(tmp_path: Path, upstream: Hub) -> None:
    """A tag can be frozen at any digest that the upstream has, even if the tag does not point at it. `frozen` lists the
    tag with this digest."""
    content = UpstreamContent()
    content.add("library/app", SECOND_IMAGE)
    upstream.put(content)
    frozen, summary = json_lines(
        "\n".join(output_of(tmp_path, "freeze", f"library/app:1@{SECOND_IMAGE.digest}", "--json"))
    )
    assert (frozen["event"], summary) == ("frozen", {"event": "done", "tags": 1, "failed": 0})
    assert (frozen["repository"], frozen["tag"]) == ("docker.io/library/app", "1")
    assert frozen["digest"] == SECOND_IMAGE.digest
    assert frozen["frozen_by"].startswith("cli:")
    (repeated,) = output_of(tmp_path, "freeze", "app:1")
    assert repeated.startswith(f"app:1: frozen already at {SECOND_IMAGE.digest}, since 20")
    (listed,) = json.loads("\n".join(output_of(tmp_path, "frozen", "--json")))
    assert listed == {name: value for name, value in frozen.items() if name not in ("event", "message")}
    assert "docker.io/library/app:1" in "\n".join(output_of(tmp_path, "frozen"))
    with running_server(tmp_path, "--config", str(tmp_path / "entrepot.toml")) as server:
        ((digest, _),) = served_digests(server)
        assert digest == SECOND_IMAGE.digest


def test_references_that_cannot_be_frozen(tmp_path: Path, upstream: Hub) -> None:
    """For each reference that cannot be frozen, there is one line with the reason. The other references are frozen."""
    unknown = "sha256:" + "0" * 64
    result = run_mirror(tmp_path, "freeze", "app:none", f"app:1@{unknown}", "local.test/app:1", "app:1")
    assert result.returncode == 1
    assert result.stdout == f"app:1: frozen at {FIRST_IMAGE.digest}\n"
    lines = result.stderr.splitlines()
    assert [line.split()[1] for line in lines] == ["app:none:", f"app:1@{unknown}:", "local.test/app:1:"]
    assert lines[2].endswith("local.test/app is hosted here and has no upstream, so there is nothing to freeze")
    assert status(tmp_path)["frozen"] == ["docker.io/library/app:1"]
    assert "is not frozen" in error_line(run_mirror(tmp_path, "unfreeze", "app:2"), 1)
    usage = error_line(run_mirror(tmp_path, "freeze", "app:1", f"app@{unknown}"), 2)
    assert usage == f"'app' names no tag to freeze; write it like app:TAG@{unknown}"
    assert "is not a digest" in error_line(run_mirror(tmp_path, "freeze", "app:1@sha256:1"), 2)


def test_purge_refuses_frozen_tags(tmp_path: Path, upstream: Hub) -> None:
    """Without --force, `purge` refuses to delete a frozen tag, a manifest that the frozen tag needs, or its repository.
    With --force, it deletes them from the cache. The tag stays frozen, and the next pull fetches the frozen digest
    again."""
    content = UpstreamContent()
    content.add("library/app", multi := index_of((FIRST_IMAGE, "amd64")), "1", "2")
    content.add("library/app", SECOND_IMAGE, "3")
    upstream.put(content)
    output_of(tmp_path, "warm", "app:1", "app:2", "app:3", "--all-platforms")
    output_of(tmp_path, "freeze", "app:1")
    upstream.forget()
    for args in (["app:1"], [f"app@{multi.digest}"], [f"app@{FIRST_IMAGE.digest}"], ["--all", "app"]):
        message = error_line(run_mirror(tmp_path, "purge", *args), 1)
        assert f"docker.io/library/app:1 is frozen at {multi.digest}, which the upstream may no longer have" in message
        assert message.endswith("add --force")
    assert output_of(tmp_path, "purge", "app:2", "app:3")[0].startswith("app:2: dropped 1 tag and 0 manifests; ")
    (line,) = output_of(tmp_path, "purge", "app:1", "--force")
    assert line.startswith("app:1: dropped 1 tag and 2 manifests; ")
    assert upstream.requests() == []
    assert "is frozen at" in error_line(run_mirror(tmp_path, "purge", "app:1"), 1)
    content.add("library/app", SECOND_IMAGE, "1")
    upstream.put(content)
    with running_server(tmp_path, "--config", str(tmp_path / "entrepot.toml")) as server:
        ((digest, _),) = served_digests(server)
        assert digest == multi.digest


def test_commands_use_the_digest_before_the_cooldown(tmp_path: Path, upstream: Hub) -> None:
    """While a cooldown delays the new digest of a tag, `refresh`, `status`, `inspect` and `warm` use and show the
    earlier digest, which pulls get."""
    configure(tmp_path, upstream, 'cooldown = "3d"\n')
    assert output_of(tmp_path, "refresh", "app:1") == [f"app:1: new here: {FIRST_IMAGE.digest}"]
    assert status(tmp_path)["held_back"] == []
    upstream.put(content_of(SECOND_IMAGE))
    (message,) = output_of(tmp_path, "refresh", "app:1")
    assert message.startswith(
        f"app:1: changed: {FIRST_IMAGE.digest} -> {SECOND_IMAGE.digest}; the upstream's digest is held back until 20"
    )
    assert message.endswith(f"UTC, and {FIRST_IMAGE.digest} is served")
    (held_back_tag,) = status(tmp_path)["held_back"]
    assert (held_back_tag["tag"], held_back_tag["served"], held_back_tag["newest"]) == (
        "docker.io/library/app:1",
        FIRST_IMAGE.digest,
        SECOND_IMAGE.digest,
    )
    assert FIRST_IMAGE.digest[:19] in "\n".join(output_of(tmp_path, "status"))
    reference = ("docker.io/library/app:1", "--json", "--config", "entrepot.toml")
    assert json.loads(entrepot_output("inspect", *reference, folder=tmp_path))["digest"] == FIRST_IMAGE.digest
    upstream.forget()
    output_of(tmp_path, "warm", "app:1")
    assert {request.digest for request in upstream.requests("blob", "GET")} == set(FIRST_IMAGE.blobs)
    with running_server(tmp_path, "--config", str(tmp_path / "entrepot.toml")) as server:
        ((digest, warning),) = served_digests(server)
        assert digest == FIRST_IMAGE.digest
        assert f"points at {SECOND_IMAGE.digest} at docker.io, which the cooldown of 3d holds back until 20" in warning


def test_new_tags_are_refused_during_a_cooldown(tmp_path: Path, upstream: Hub) -> None:
    """With `cooldown_new = "refuse"`, a pull of a tag that the mirror did not know is denied, and the error says how to
    continue. A pull by digest works."""
    configure(tmp_path, upstream, 'cooldown = "3d"\ncooldown_new = "refuse"\n')
    with running_server(tmp_path, "--config", str(tmp_path / "entrepot.toml")) as server:
        refused = plain_request("GET", f"{server.url}/v2/app/manifests/1")
        assert refused.status_code == 403
        (error,) = refused.json()["errors"]
        assert error["code"] == "DENIED"
        assert error["message"].startswith("docker.io/library/app:1 is new here, and the cooldown of 3d holds it back")
        assert error["message"].endswith("UTC on; until then, pull it by digest")
        assert plain_request("GET", f"{server.url}/v2/app/manifests/{FIRST_IMAGE.digest}").status_code == 200
        assert plain_request("HEAD", f"{server.url}/v2/app/manifests/1").status_code == 403
    assert "and the cooldown of 3d holds it back" in error_line(run_mirror(tmp_path, "freeze", "app:1"), 1)
    (held,) = status(tmp_path)["held_back"]
    assert held["served"] is None
