"""`entrepot mirror freeze|unfreeze|frozen`, and what `status` and `refresh` say about frozen tags and cooldowns, beside
a running server and without one."""

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

FIRST, SECOND = noise_image("first", 1000), noise_image("second", 1000)


@pytest.fixture
def upstream(tmp_path: Path) -> Iterator[Hub]:
    with hub(tmp_path, content_of(FIRST)) as running:
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


def mirror(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return entrepot("mirror", *args, "--config", "entrepot.toml", folder=folder)


def done(folder: Path, *args: str) -> list[str]:
    """Returns the output lines of a command that must succeed."""
    ended = mirror(folder, *args)
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout.splitlines()


def status(folder: Path) -> dict[str, Any]:
    (seen,) = json.loads("\n".join(done(folder, "status", "--json")))["upstreams"]
    assert isinstance(seen, dict)
    return seen


def served(server: RegistryServer) -> set[tuple[str, str]]:
    """Returns the digests and warnings in the responses of all workers, over several connections."""
    answers = [plain_request("HEAD", f"{server.url}/v2/app/manifests/1") for _ in range(12)]
    return {(answer.headers["docker-content-digest"], answer.headers.get("warning", "")) for answer in answers}


def test_freezing_beside_a_server(tmp_path: Path, upstream: Hub) -> None:
    """All workers serve a frozen tag at its digest, with a Warning, and do not ask the upstream for the tag. After it
    is unfrozen, they serve what the upstream has."""
    with running_server(tmp_path, "--config", str(tmp_path / "entrepot.toml"), "--workers", "2") as server:
        assert served(server) == {(FIRST.digest, "")}
        assert done(tmp_path, "freeze", "app:1") == [f"app:1: frozen at {FIRST.digest}"]
        upstream.put(content_of(SECOND))
        upstream.forget()
        ((digest, warning),) = served(server)
        assert digest == FIRST.digest
        assert warning.startswith(f'299 - "docker.io/library/app:1 is frozen at {FIRST.digest} since 20')
        (said,) = done(tmp_path, "refresh", "app:1")
        assert said.startswith(f"app:1: frozen at {FIRST.digest} since 20")
        assert upstream.requests("manifest") == []
        assert status(tmp_path)["frozen"] == ["docker.io/library/app:1"]
        assert "1 tag frozen: entrepot mirror frozen lists them" in done(tmp_path, "status")
        (said,) = done(tmp_path, "unfreeze", "app:1")
        assert said.startswith(f"app:1: no longer frozen; it was at {FIRST.digest} since 20")
        assert served(server) == {(SECOND.digest, "")}


def test_freezing_at_a_digest(tmp_path: Path, upstream: Hub) -> None:
    """A tag can be frozen at a digest at which it does not point, if the upstream has the digest. The lists show this
    digest."""
    content = UpstreamContent()
    content.add("library/app", SECOND)
    upstream.put(content)
    frozen, last = json_lines("\n".join(done(tmp_path, "freeze", f"library/app:1@{SECOND.digest}", "--json")))
    assert (frozen["event"], last) == ("frozen", {"event": "done", "tags": 1, "failed": 0})
    assert (frozen["repository"], frozen["tag"]) == ("docker.io/library/app", "1")
    assert frozen["digest"] == SECOND.digest
    assert frozen["frozen_by"].startswith("cli:")
    (again,) = done(tmp_path, "freeze", "app:1")
    assert again.startswith(f"app:1: frozen already at {SECOND.digest}, since 20")
    (listed,) = json.loads("\n".join(done(tmp_path, "frozen", "--json")))
    assert listed == {name: value for name, value in frozen.items() if name not in ("event", "message")}
    assert "docker.io/library/app:1" in "\n".join(done(tmp_path, "frozen"))
    with running_server(tmp_path, "--config", str(tmp_path / "entrepot.toml")) as server:
        ((digest, _),) = served(server)
        assert digest == SECOND.digest


def test_what_cannot_be_frozen(tmp_path: Path, upstream: Hub) -> None:
    """Each refusal is one line with the reason, and freezes nothing. The other references are still handled."""
    unknown = "sha256:" + "0" * 64
    ended = mirror(tmp_path, "freeze", "app:none", f"app:1@{unknown}", "local.test/app:1", "app:1")
    assert ended.returncode == 1
    assert ended.stdout == f"app:1: frozen at {FIRST.digest}\n"
    lines = ended.stderr.splitlines()
    assert [line.split()[1] for line in lines] == ["app:none:", f"app:1@{unknown}:", "local.test/app:1:"]
    assert lines[2].endswith("local.test/app is hosted here and has no upstream, so there is nothing to freeze")
    assert status(tmp_path)["frozen"] == ["docker.io/library/app:1"]
    assert "is not frozen" in error_line(mirror(tmp_path, "unfreeze", "app:2"), 1)
    usage = error_line(mirror(tmp_path, "freeze", "app:1", f"app@{unknown}"), 2)
    assert usage == f"'app' names no tag to freeze; write it like app:TAG@{unknown}"
    assert "is not a digest" in error_line(mirror(tmp_path, "freeze", "app:1@sha256:1"), 2)


def test_a_purge_spares_frozen_tags(tmp_path: Path, upstream: Hub) -> None:
    """Unless it is forced, a purge deletes neither a frozen tag, nor a digest that it needs, nor its repository. After
    a forced purge, the next pull fetches the frozen digest again."""
    content = UpstreamContent()
    content.add("library/app", multi := index_of((FIRST, "amd64")), "1", "2")
    content.add("library/app", SECOND, "3")
    upstream.put(content)
    done(tmp_path, "warm", "app:1", "app:2", "app:3", "--all-platforms")
    done(tmp_path, "freeze", "app:1")
    upstream.forget()
    for args in (["app:1"], [f"app@{multi.digest}"], [f"app@{FIRST.digest}"], ["--all", "app"]):
        said = error_line(mirror(tmp_path, "purge", *args), 1)
        assert f"docker.io/library/app:1 is frozen at {multi.digest}, which the upstream may no longer have" in said
        assert said.endswith("add --force")
    assert done(tmp_path, "purge", "app:2", "app:3")[0].startswith("app:2: dropped 1 tag and 0 manifests; ")
    (line,) = done(tmp_path, "purge", "app:1", "--force")
    assert line.startswith("app:1: dropped 1 tag and 2 manifests; ")
    assert upstream.requests() == []
    assert "is frozen at" in error_line(mirror(tmp_path, "purge", "app:1"), 1)
    content.add("library/app", SECOND, "1")
    upstream.put(content)
    with running_server(tmp_path, "--config", str(tmp_path / "entrepot.toml")) as server:
        ((digest, _),) = served(server)
        assert digest == multi.digest


def test_a_cooldown_in_the_commands(tmp_path: Path, upstream: Hub) -> None:
    """While a cooldown holds a tag back, `refresh`, `status`, `inspect` and `warm` show the digest that pulls get."""
    configure(tmp_path, upstream, 'cooldown = "3d"\n')
    assert done(tmp_path, "refresh", "app:1") == [f"app:1: new here: {FIRST.digest}"]
    assert status(tmp_path)["held_back"] == []
    upstream.put(content_of(SECOND))
    (said,) = done(tmp_path, "refresh", "app:1")
    assert said.startswith(f"app:1: changed: {FIRST.digest} -> {SECOND.digest}; it is held back until 20")
    assert said.endswith(f"UTC, and {FIRST.digest} is served")
    (held,) = status(tmp_path)["held_back"]
    assert (held["tag"], held["served"], held["newest"]) == ("docker.io/library/app:1", FIRST.digest, SECOND.digest)
    assert FIRST.digest[:19] in "\n".join(done(tmp_path, "status"))
    reference = ("docker.io/library/app:1", "--json", "--config", "entrepot.toml")
    assert json.loads(entrepot_output("inspect", *reference, folder=tmp_path))["digest"] == FIRST.digest
    upstream.forget()
    done(tmp_path, "warm", "app:1")
    assert {seen.digest for seen in upstream.requests("blob", "GET")} == set(FIRST.blobs)
    with running_server(tmp_path, "--config", str(tmp_path / "entrepot.toml")) as server:
        ((digest, warning),) = served(server)
        assert digest == FIRST.digest
        assert f"points at {SECOND.digest} at docker.io, which the cooldown of 3d holds back until 20" in warning


def test_new_tags_are_refused(tmp_path: Path, upstream: Hub) -> None:
    """With `cooldown_new = "refuse"`, the pull of a new tag is denied with a text that says what to do. A pull by
    digest works."""
    configure(tmp_path, upstream, 'cooldown = "3d"\ncooldown_new = "refuse"\n')
    with running_server(tmp_path, "--config", str(tmp_path / "entrepot.toml")) as server:
        refused = plain_request("GET", f"{server.url}/v2/app/manifests/1")
        assert refused.status_code == 403
        (error,) = refused.json()["errors"]
        assert error["code"] == "DENIED"
        assert error["message"].startswith("docker.io/library/app:1 is new here, and the cooldown of 3d holds it back")
        assert error["message"].endswith("UTC on; until then, pull it by digest")
        assert plain_request("GET", f"{server.url}/v2/app/manifests/{FIRST.digest}").status_code == 200
        assert plain_request("HEAD", f"{server.url}/v2/app/manifests/1").status_code == 403
    assert "and the cooldown of 3d holds it back" in error_line(mirror(tmp_path, "freeze", "app:1"), 1)
    (held,) = status(tmp_path)["held_back"]
    assert held["served"] is None
