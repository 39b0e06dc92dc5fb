"""Tests of retention (the job that deletes old tags by rules) on a running server: previews and runs, by the API and by
the command."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.admin_site import ADMIN, PASSWORD, AdminSite, code_of
from tests.fakes.commands import entrepot, entrepot_output, json_lines
from tests.fakes.plain_client import plain_client
from tests.fakes.raw_pushes import OCI_MANIFEST, digest_of, image
from tests.fakes.server_process import running_server

SETTINGS = """
[upkeep]
retention_every = 0

[[retention]]
repositories = "team/**"
keep_last = 2
keep_tags = ["v*"]

[[retention]]
repositories = ["scratch/*", "taem/*"]
keep_last = 1
delete_untagged_after = "0s"

[[immutable]]
repositories = "scratch/fixed"
tags = "1.*"
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdminSite]:
    """Runs a server with retention rules, which it applies only on request."""
    folder = tmp_path_factory.mktemp("retention")
    (folder / "entrepot.toml").write_text(SETTINGS)
    entrepot_output("user", "add", ADMIN, "--admin", "--password-file", "-", folder=folder, stdin_text=PASSWORD)
    with running_server(folder, "--config", "entrepot.toml") as server:
        yield AdminSite(server, folder)


def push(site: AdminSite, repo: str, *tags: str) -> None:
    """Pushes a different image for each tag, one after the other."""
    with plain_client(f"{site.server.url}/v2/{repo}", auth=(ADMIN, PASSWORD)) as client:
        for tag in tags:
            blobs = [f"{role} of {repo}:{tag}".encode() for role in ("config", "layer")]
            for blob in blobs:
                location = client.post("/blobs/uploads/").headers["location"]
                client.put(f"{site.server.url}{location}", params={"digest": digest_of(blob)}, content=blob)
            headers = {"content-type": OCI_MANIFEST}
            answer = client.put(f"/manifests/{tag}", content=image(*blobs), headers=headers)
            assert answer.status_code == 201, answer.text


def tags(site: AdminSite, repo: str) -> list[str]:
    """Returns the tags of a repository."""
    with plain_client(f"{site.server.url}/v2/{repo}", auth=(ADMIN, PASSWORD)) as client:
        listed: list[str] = client.get("/tags/list").json()["tags"]
        return listed


def run_job(site: AdminSite) -> Any:
    """Starts the retention job, waits for its end, and returns its result."""
    job = site.call_ok("POST", "/retention", {})
    deadline = time.monotonic() + 60
    while (found := site.call_ok("GET", f"/jobs/{job['id']}"))["ended"] is None:
        assert time.monotonic() < deadline
    assert found["state"] == "done", found
    return found["result"]


def test_a_preview_names_each_tag_and_the_reason(site: AdminSite) -> None:
    """A preview of a repository lists each tag in pages, with the reason why it would be kept or deleted. The first
    page has the totals."""
    push(site, "team/preview", "a", "b", "c", "v1")
    first = site.call_ok("GET", "/retention/preview", repository="team/preview", limit=3)
    assert first["rule"] == "rule 1 (team/**)"
    assert [(item["tag"], item["kept"]) for item in first["items"]] == [("a", False), ("b", False), ("c", True)]
    assert first["items"][0]["reason"].startswith("not one of the newest 2, pushed 20")
    assert (first["items"][2]["reason"], first["items"][2]["pulled"]) == ("one of the newest 2", None)
    assert (first["totals"]["tags_kept"], first["totals"]["tags_deleted"]) == (2, 2)
    assert first["totals"]["bytes_left"] > 0 == first["totals"]["bytes_freed"]
    second = site.call_ok("GET", "/retention/preview", repository="team/preview", limit=3, after=first["next"])
    assert ([item["tag"] for item in second["items"]], second["next"], second["totals"]) == (["v1"], None, None)


def test_a_preview_of_all_repositories(site: AdminSite) -> None:
    """The preview of all repositories lists them in pages, in the order of their names, with the numbers of kept and
    deleted tags."""
    for name in ("all-a", "all-b"):
        push(site, f"team/{name}", "a", "b", "c")
    first = site.call_ok("GET", "/retention/repositories", after="team/all", limit=1)
    assert first == {
        "items": [
            {
                "repository": "team/all-a",
                "rule": "rule 1 (team/**)",
                "tags_kept": 2,
                "tags_deleted": 1,
                "complete": True,
            }
        ],
        "next": "team/all-a",
    }
    second = site.call_ok("GET", "/retention/repositories", after=first["next"])
    assert second["items"][0]["repository"] == "team/all-b"
    assert second["next"] is None


def test_a_preview_needs_rights_on_the_repository(site: AdminSite) -> None:
    """A preview needs the action `admin` on the repository. Other callers get the same error whether or not the
    repository exists."""
    user = site.user()
    for repo in ("team/mine", "team/none"):
        answer = site.call("GET", "/retention/preview", auth=user, repository=repo)
        assert (answer.status_code, code_of(answer)) == (403, "DENIED")
    site.call_ok("PUT", "/grants", {"subject": f"user:{user[0]}", "pattern": "team/mine", "actions": ["admin"]})
    assert site.call("GET", "/retention/preview", auth=user, repository="team/mine").status_code == 200
    assert site.call("GET", "/retention/preview", auth=user, repository="team/none").status_code == 403
    assert site.call("POST", "/retention", {}, auth=user).status_code == 403


@pytest.mark.parametrize(("repository", "status"), [("private/app", 404), ("Team/App", 400), ("", 400), (None, 422)])
def test_previews_of_other_repositories(site: AdminSite, repository: str | None, status: int) -> None:
    """A preview needs a valid name of a repository to which a rule applies."""
    query: dict[str, Any] = {} if repository is None else {"repository": repository}
    assert site.call("GET", "/retention/preview", **query).status_code == status


def test_run_deletes_old_tags(site: AdminSite) -> None:
    """A run deletes the tags that the rules do not keep, and warns of a pattern that applies to no repository. The
    audit log has an entry for each deleted tag."""
    push(site, "team/run", "kept")  # without this, the run would warn that the first rule applies to nothing
    push(site, "scratch/run", "a", "b", "c")
    assert tags(site, "scratch/run") == ["a", "b", "c"]
    result = run_job(site)
    assert tags(site, "scratch/run") == ["c"]
    assert result["tags_deleted"] >= 2
    assert result["warnings"] == ["rule 2: the pattern taem/* applies to no hosted repository with content"]
    [line] = site.call_ok("GET", "/audit", target="scratch/run:a", limit=1)["items"]
    assert (line["action"], line["actor"]) == ("tag.delete", "entrepot retention")


def test_command_while_a_server_runs(site: AdminSite) -> None:
    """`entrepot retention preview` and `apply` print text, or JSON lines with --json. The running server no longer has
    the tags that `apply` has deleted."""
    push(site, "team/command", "kept")  # without this, the run would warn that the first rule applies to nothing
    push(site, "scratch/command", "a", "b")
    options = ("--config", "entrepot.toml")
    preview = entrepot("retention", "preview", "scratch/command", *options, folder=site.folder)
    assert (preview.returncode, preview.stderr) == (0, "")
    lines = preview.stdout.splitlines()
    assert lines[0].startswith("delete scratch/command:a  not one of the newest 1, pushed 20")
    assert lines[1] == "keep   scratch/command:b  one of the newest 1 (rule 2)"
    assert lines[2] == "1 tag and 0 untagged manifests would be deleted, and 1 tag kept"
    assert lines[3].endswith("would be freed, once delete_untagged_after and gc.grace have passed")

    completed = entrepot("retention", "preview", *options, "--json", folder=site.folder)
    steps = json_lines(completed.stdout)
    digest = digest_of(image(b"config of scratch/command:a", b"layer of scratch/command:a"))
    [step] = [step for step in steps if step.get("repository") == "scratch/command" and step["tag"] == "a"]
    assert (step["event"], step["action"]) == ("would be deleted", "delete")
    assert (step["digest"], step["rule"], step["pulled"]) == (digest, 2, None)
    assert steps[-1]["warnings"] == ["rule 2: the pattern taem/* applies to no hosted repository with content"]

    applied = entrepot("retention", "apply", *options, "--json", folder=site.folder)
    assert applied.returncode == 0, applied.stderr
    steps = json_lines(applied.stdout)
    assert {step["event"] for step in steps[:-1]} == {"deleted"}
    assert {(step["repository"], step["tag"]) for step in steps[:-1] if "tag" in step} >= {("scratch/command", "a")}
    assert steps[-1]["tags_deleted"] >= 1
    assert tags(site, "scratch/command") == ["b"]
    second_run = entrepot("retention", "apply", *options, folder=site.folder)
    assert second_run.stdout.startswith("deleted 0 tags and 0 manifests; kept ")
    assert second_run.stderr.splitlines() == [
        "entrepot: warning: rule 2: the pattern taem/* applies to no hosted repository with content"
    ]


def test_retention_keeps_immutable_tags(site: AdminSite) -> None:
    """Retention keeps an immutable tag, and the preview gives this reason."""
    push(site, "scratch/fixed", "1.0", "a", "b")
    options = ("--config", "entrepot.toml")
    preview = entrepot_output("retention", "preview", "scratch/fixed", *options, folder=site.folder).splitlines()
    assert preview[0] == "keep   scratch/fixed:1.0  it is immutable (rule 2)"
    run_job(site)
    assert tags(site, "scratch/fixed") == ["1.0", "b"]


def test_a_repository_without_a_rule(site: AdminSite) -> None:
    """If no rule applies to a repository, the command says that everything is kept."""
    completed = entrepot("retention", "preview", "private/app", "--config", "entrepot.toml", folder=site.folder)
    assert (completed.returncode, completed.stdout) == (1, "")
    assert completed.stderr == (
        "entrepot: no [[retention]] rule in the settings applies to private/app, so all of it is kept\n"
    )


def test_rule_that_deletes_all_tags_must_be_confirmed(tmp_path: Path) -> None:
    """A rule that deletes all tags must be confirmed: with `delete_all` in the settings, or else the server does not
    start, and with --yes for the command."""
    rule = '[[retention]]\nrepositories = "scratch/**"\nkeep_last = 0\n'
    (tmp_path / "entrepot.toml").write_text(rule)
    refused = entrepot("serve", "--config", "entrepot.toml", folder=tmp_path)
    assert refused.returncode == 2
    assert "retention[1]: the rule would delete every tag" in refused.stderr
    (tmp_path / "entrepot.toml").write_text(rule + "delete_all = true\n")
    with running_server(tmp_path, "--config", "entrepot.toml") as server:
        push(AdminSite(server, tmp_path), "scratch/app", "a")
        options = ("--config", "entrepot.toml", "--data", "data")
        unconfirmed = entrepot("retention", "apply", *options, folder=tmp_path)
        assert unconfirmed.returncode == 2
        assert "deletes every tag of scratch/**; add `--yes` to confirm" in unconfirmed.stderr
        confirmed = entrepot("retention", "apply", "--yes", *options, folder=tmp_path)
        assert (confirmed.returncode, confirmed.stdout.splitlines()[-1]) == (
            0,
            "deleted 1 tag and 0 manifests; kept 0 tags",
        )


def test_server_runs_retention_by_schedule(tmp_path: Path) -> None:
    """The server applies the rules at the interval `retention_every` in the settings."""
    (tmp_path / "entrepot.toml").write_text(
        '[upkeep]\nretention_every = "1s"\n[[retention]]\nrepositories = "team/**"\nkeep_last = 1\n'
    )
    with running_server(tmp_path, "--config", "entrepot.toml") as server:
        site = AdminSite(server, tmp_path)
        for _ in range(2):
            push(site, "team/app", "a", "b", "c")
            deadline = time.monotonic() + 60
            while tags(site, "team/app") != ["c"]:
                assert time.monotonic() < deadline
        [job, *_] = json.loads(entrepot_output("jobs", "list", "--json", "--kind", "retention", folder=tmp_path))
        assert (job["started_by"], job["arguments"]) == ("entrepot retention", {})


@pytest.mark.parametrize("command", ["preview", "apply"])
def test_settings_without_rules(tmp_path: Path, command: str) -> None:
    """If the settings have no rules, the command says that all tags are kept."""
    with running_server(tmp_path):
        pass
    completed = entrepot("retention", command, folder=tmp_path)
    assert (completed.returncode, completed.stdout) == (1, "")
    assert completed.stderr.startswith("entrepot: the settings have no rule, so all tags are kept; add [[retention]]")
