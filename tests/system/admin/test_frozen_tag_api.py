"""Tests of `/api/v1/mirror/frozen`, which freezes, lists and unfreezes mirrored tags. A frozen tag stays at one digest,
whatever the upstream has."""

from __future__ import annotations

from typing import Any

from tests.fakes.admin_site import ADMIN, AdminSite, code_of
from tests.system.admin.conftest import MIRRORED


def frozen_tags(site: AdminSite, **more: Any) -> list[str]:
    """Returns the names of the frozen tags that the caller may see."""
    listed = site.call_ok("GET", "/mirror/frozen", **more)["items"]
    return [f"{item['repository']}:{item['tag']}" for item in listed]


def test_freeze_by_an_admin(mirror_site: AdminSite) -> None:
    """An admin can freeze a tag at its current digest or at a given digest, list all frozen tags in pages, and unfreeze
    them. A change is visible at once in all workers and in `entrepot mirror frozen`. The audit log names the
    admin."""
    site = mirror_site
    frozen = site.call_ok("PUT", "/mirror/frozen", {"reference": "app:1"})
    assert (frozen["repository"], frozen["tag"], frozen["digest"]) == ("docker.io/library/app", "1", MIRRORED.digest)
    assert frozen["frozen_by"] == ADMIN
    site.call_ok("PUT", "/mirror/frozen", {"reference": f"docker.io/library/app:2@{MIRRORED.digest}"})
    site.call_ok("PUT", "/mirror/frozen", {"reference": "docker.io/team/app:1"})
    names = ["docker.io/library/app:1", "docker.io/library/app:2", "docker.io/team/app:1"]
    assert frozen_tags(site) == names
    page = site.call_ok("GET", "/mirror/frozen", limit=2)
    assert page["next"] == names[1]
    assert frozen_tags(site, after=page["next"], limit=2) == names[2:]
    config = str(site.folder / "entrepot.toml")
    assert names[2] in site.command("mirror", "frozen", "--config", config)
    for name in names:
        site.call_ok("DELETE", "/mirror/frozen", reference=name)
    assert frozen_tags(site) == []
    not_frozen = site.call("DELETE", "/mirror/frozen", reference=names[0])
    assert (not_frozen.status_code, code_of(not_frozen)) == (404, "TAG_NOT_FROZEN")
    (line, *_) = site.call_ok("GET", "/audit", action="tag.freeze", actor=ADMIN)["items"]
    assert (line["action"], line["target"]) == ("tag.freeze", "docker.io/team/app:1")
    assert line["detail"] == {"digest": MIRRORED.digest}


def test_freeze_by_the_admin_of_a_repository(mirror_site: AdminSite) -> None:
    """An account with the action `admin` on a repository can freeze, list and unfreeze the tags of this repository, but
    no other tags."""
    site = mirror_site
    user = site.user()
    site.call_ok("PUT", "/grants", {"subject": f"user:{user[0]}", "pattern": "docker.io/team/**", "actions": ["admin"]})
    site.call_ok("PUT", "/mirror/frozen", {"reference": "app:3"})
    site.call_ok("PUT", "/mirror/frozen", {"reference": "docker.io/team/app:1"}, auth=user)
    assert frozen_tags(site, auth=user) == ["docker.io/team/app:1"]
    for reference in ("app:3", "docker.io/none:1"):
        for refused in (
            site.call("PUT", "/mirror/frozen", {"reference": reference}, auth=user),
            site.call("DELETE", "/mirror/frozen", auth=user, reference=reference),
        ):
            assert (refused.status_code, code_of(refused)) == (403, "DENIED")
    site.call_ok("DELETE", "/mirror/frozen", auth=user, reference="docker.io/team/app:1")
    nobody = site.user()
    assert frozen_tags(site, auth=nobody) == []
    site.call_ok("DELETE", "/mirror/frozen", reference="app:3")


def test_bad_references(mirror_site: AdminSite) -> None:
    """A reference that cannot be frozen is refused with an error, and nothing is frozen."""
    site = mirror_site
    for reference, status in (
        ("app:none", 404),
        (f"app:1@sha256:{'0' * 64}", 404),
        ("local.test/app:1", 404),
        ("App:1", 400),
        (f"app@{MIRRORED.digest}", 400),
        ("app:1@sha256:1", 400),
    ):
        refused = site.call("PUT", "/mirror/frozen", {"reference": reference})
        assert (refused.status_code, bool(code_of(refused))) == (status, True), reference
    assert frozen_tags(site) == []
