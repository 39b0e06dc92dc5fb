"""Logins at an upstream through the whole service: tokens, redirects, passwords, and credentials of clients."""

from __future__ import annotations

import base64
from collections.abc import Mapping

import pytest

from tests.fakes.client_images import MIB
from tests.fakes.hub.hub import repeated
from tests.fakes.mirror_site import REPO, MirrorSite
from tests.fakes.upstream_content import noise_image

PASSWORD = "correct-horse-battery"


def pull(site: MirrorSite, headers: Mapping[str, str] | None = None) -> None:
    """Pulls the whole image and checks its bytes."""
    manifest = site.get(f"/v2/{REPO}/manifests/1", headers=headers).ended()
    assert (manifest.status, bytes(manifest.body)) == (200, site.image.body)
    for digest, blob in site.image.blobs.items():
        answer = site.get(f"/v2/{REPO}/blobs/{digest}", headers=headers).ended()
        assert (answer.status, bytes(answer.body)) == (200, blob.read())


def test_tokens_that_end_in_the_middle_of_a_pull(site: MirrorSite) -> None:
    """A pull of many requests succeeds although each token is valid for two requests, whatever lifetime it states."""
    site.start(1000, MIB, 12 * MIB, settings='prefetch = "off"\nconnections = 1', token_uses=2)
    pull(site)
    assert site.hub.count("token") > 2
    assert repeated(site.hub.sent(site.digest)) == []


def test_a_token_that_ends_in_the_middle_of_a_blob(site: MirrorSite) -> None:
    """A blob whose connection breaks when all tokens were revoked continues with a new token."""
    site.start(settings='prefetch = "off"')
    site.inspect()
    site.hub.fault(on="blob", match=site.encoded, stall_after=MIB, drop_after=2 * MIB)
    reader = site.get().reached(MIB)
    site.hub.revoke()
    site.hub.release()
    assert reader.ended().body == site.blob
    site.http.get(f"/v2/{REPO}/blobs/{site.image.config.digest}")
    assert site.hub.count("token") == 2
    assert repeated(site.hub.sent(site.digest)) == []


def test_redirects_are_followed_without_credentials(site: MirrorSite) -> None:
    """The host with the bytes refuses requests with Authorization, and gets none although we have logged in."""
    folder = site.folder / "password"
    folder.write_text(PASSWORD + "\n")
    settings = f'username = "me"\npassword_file = "{folder}"\nrequire_grant = false'
    site.start(settings=settings, more='log_level = "debug"', username="me", password=PASSWORD, private=(REPO,))
    pull(site)
    assert site.hub.count("redirect") > 0
    assert not any(seen.authorization for seen in site.hub.requests("blob"))
    assert all(seen.status in (200, 206) for seen in site.hub.requests("blob"))
    assert not_in_log(site, PASSWORD, encoded("me", PASSWORD))


def test_links_that_are_good_once(site: MirrorSite) -> None:
    """Redirect URLs may be valid for one request: each piece of a large blob requests one of its own, and a new one if
    it is refused."""
    site.start(1000, 12 * MIB, link_uses=1)
    pull(site)


@pytest.mark.parametrize("hidden", [False, True], ids=["404", "401"])
def test_what_is_unknown(site: MirrorSite, hidden: bool) -> None:
    """Unknown content gets 404, whether the upstream says so or refuses everybody with 401."""
    site.start(hide_unknown=hidden)
    for path in ("team/none/manifests/1", "team/none/blobs/" + site.digest, "app/manifests/none"):
        answer = site.get(f"/v2/{path}").ended()
        assert answer.status == 404, path
        assert (b'"BLOB_UNKNOWN"' if "blobs" in path else b'"MANIFEST_UNKNOWN"') in answer.body


def test_what_is_private(site: MirrorSite) -> None:
    """Without a login at the upstream, private content is unknown."""
    site.content.add("team/secret", noise_image("secret", 1000), "1")
    site.start(private=("team/secret",))
    assert site.get("/v2/team/secret/manifests/1").ended().status == 404
    assert site.get(f"/v2/team/secret/blobs/{noise_image('secret', 1000).layers[0].digest}").ended().status == 404
    pull(site)


@pytest.mark.parametrize("auth", ["bearer", "basic"])
def test_a_login_that_is_refused(site: MirrorSite, auth: str) -> None:
    """If the upstream refuses the login, clients get 403 DENIED, so that the administrator notices. No log contains the
    password."""
    wrong = "wrong-pony-capacitor"
    (site.folder / "password").write_text(wrong)
    settings = f'username = "me"\npassword_file = "{site.folder / "password"}"\nrequire_grant = false'
    site.start(settings=settings, more='log_level = "debug"', auth=auth, username="me", password=PASSWORD)
    answer = site.http.get(f"/v2/{REPO}/manifests/1")
    assert (answer.status_code, answer.json()["errors"][0]["code"]) == (403, "DENIED")
    assert not_in_log(site, wrong, encoded("me", wrong))
    assert wrong not in answer.text


@pytest.mark.parametrize("auth", ["off", "bearer"])
def test_what_clients_send_of_their_own(site: MirrorSite, auth: str) -> None:
    """A client's login or token is not forwarded, fails no pull, and is in no log."""
    login, token = encoded("stray", "login-of-a-client"), "stray-token-of-a-client"
    site.start(more='log_level = "debug"', auth=auth)
    for own in (f"Bearer {token}", f"Basic {login}", "Negotiate"):
        pull(site, {"Authorization": own})
        answer = site.get("/v2/team/none/manifests/1", headers={"Authorization": own}).ended()
        assert answer.status == 404
        assert site.http.delete(f"/v2/{REPO}/manifests/{site.image.digest}").status_code == 202
    assert not any(seen.authorization for kind in ("token", "blob") for seen in site.hub.requests(kind))
    if auth == "off":
        assert not any(seen.authorization for seen in site.hub.requests())
    assert not_in_log(site, login, token, "login-of-a-client")


def encoded(user: str, password: str) -> str:
    return base64.b64encode(f"{user}:{password}".encode()).decode()


def not_in_log(site: MirrorSite, *secrets: str) -> bool:
    text = site.server.log_text()
    return not any(secret in text for secret in secrets)


def test_clients_that_have_it_already(site: MirrorSite) -> None:
    """If-None-Match with the current digest gets 304: for a manifest that is fetched for this request, and for a blob
    once it is stored and verified. With another digest the content is sent, also for a tag that has moved."""
    site.start(settings='tag_ttl = "0s"\nprefetch = "off"')
    manifest, blob = f"/v2/{REPO}/manifests/1", site.path
    etag, stale = f'"{site.image.digest}"', f'"{site.digest}"'
    others = f'"sha256:{"0" * 64}"'
    for method in ("GET", "HEAD"):
        answer = site.http.request(method, manifest, headers={"If-None-Match": f"{others}, W/{etag}"})
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", etag)
    assert site.hub.count("blob") == 0
    answer = site.http.get(manifest, headers={"If-None-Match": stale})
    assert (answer.status_code, answer.content) == (200, site.image.body)
    answer = site.http.get(blob, headers={"If-None-Match": etag})
    assert (answer.status_code, answer.content) == (200, site.blob)
    for method in ("GET", "HEAD"):
        answer = site.http.request(method, blob, headers={"If-None-Match": f"{others}, W/{stale}"})
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", stale)
    moved = site.content.add(REPO, noise_image("moved", 2000), "1")
    site.hub.put(site.content)
    answer = site.http.get(manifest, headers={"If-None-Match": etag})
    assert (answer.status_code, answer.content) == (200, moved.body)
    site.hub.refuse()
    answer = site.http.get(manifest, headers={"If-None-Match": f'"{moved.digest}"'})
    assert (answer.status_code, answer.headers["warning"][:6]) == (304, "299 - ")


def test_a_condition_on_what_is_not_there(site: MirrorSite) -> None:
    """A conditional request for unknown content gets 404 like any other."""
    site.start()
    digest = "sha256:" + "0" * 64
    for path in (f"/v2/{REPO}/manifests/none", f"/v2/{REPO}/manifests/{digest}", f"/v2/{REPO}/blobs/{digest}"):
        answer = site.http.get(path, headers={"If-None-Match": f'"{digest}"'})
        assert answer.status_code == 404
