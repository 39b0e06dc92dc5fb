"""Tests of the mirror's login at an upstream: tokens, redirects and passwords. They also test that the mirror ignores
the credentials of its clients."""

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
    manifest = site.get(f"/v2/{REPO}/manifests/1", headers=headers).wait_for_end()
    assert (manifest.status, bytes(manifest.body)) == (200, site.image.body)
    for digest, blob in site.image.blobs.items():
        answer = site.get(f"/v2/{REPO}/blobs/{digest}", headers=headers).wait_for_end()
        assert (answer.status, bytes(answer.body)) == (200, blob.read())


def test_tokens_can_expire_during_a_pull(site: MirrorSite) -> None:
    """The upstream accepts each token for two requests only, although the token states a longer lifetime. A pull of
    many requests still succeeds."""
    site.start(1000, MIB, 12 * MIB, settings='prefetch = "off"\nconnections = 1', token_uses=2)
    pull(site)
    assert site.hub.count("token") > 2
    assert repeated(site.hub.sent_ranges(site.digest)) == []


def test_token_can_be_revoked_during_a_blob(site: MirrorSite) -> None:
    """All tokens are revoked, and the connection breaks in the middle of a blob. The mirror gets a new token and
    continues the download."""
    site.start(settings='prefetch = "off"')
    site.get_manifest()
    site.hub.fault(on="blob", match=site.digest_hex, stall_after=MIB, drop_after=2 * MIB)
    reader = site.get().wait_for_bytes(MIB)
    site.hub.revoke()
    site.hub.release()
    assert reader.wait_for_end().body == site.blob
    site.http.get(f"/v2/{REPO}/blobs/{site.image.config.digest}")
    assert site.hub.count("token") == 2
    assert repeated(site.hub.sent_ranges(site.digest)) == []


def test_redirects_are_followed_without_credentials(site: MirrorSite) -> None:
    """The upstream redirects blob requests to a host that refuses requests with Authorization. The mirror logs in at
    the upstream, but sends no credentials to this host."""
    password_file = site.folder / "password"
    password_file.write_text(PASSWORD + "\n")
    settings = f'username = "me"\npassword_file = "{password_file}"\nrequire_grant = false'
    site.start(settings=settings, more='log_level = "debug"', username="me", password=PASSWORD, private=(REPO,))
    pull(site)
    assert site.hub.count("redirect") > 0
    assert not any(request.authorization for request in site.hub.requests("blob"))
    assert all(request.status in (200, 206) for request in site.hub.requests("blob"))
    assert not_in_log(site, PASSWORD, encoded("me", PASSWORD))


def test_redirect_urls_can_be_valid_for_one_request(site: MirrorSite) -> None:
    """The upstream accepts each redirect URL for one request only. The mirror requests a new URL for each piece of a
    large blob, and the pull succeeds."""
    site.start(1000, 12 * MIB, link_uses=1)
    pull(site)


@pytest.mark.parametrize("hidden", [False, True], ids=["404", "401"])
def test_unknown_content_gets_404(site: MirrorSite, hidden: bool) -> None:
    """Unknown content gets 404, both from an upstream that answers 404 and from an upstream that hides unknown
    repositories with 401."""
    site.start(hide_unknown=hidden)
    for path in ("team/none/manifests/1", "team/none/blobs/" + site.digest, "app/manifests/none"):
        answer = site.get(f"/v2/{path}").wait_for_end()
        assert answer.status == 404, path
        assert (b'"BLOB_UNKNOWN"' if "blobs" in path else b'"MANIFEST_UNKNOWN"') in answer.body


def test_private_content_without_a_login_gets_404(site: MirrorSite) -> None:
    """If the mirror has no login at the upstream, requests for private content get 404."""
    site.content.add("team/secret", noise_image("secret", 1000), "1")
    site.start(private=("team/secret",))
    assert site.get("/v2/team/secret/manifests/1").wait_for_end().status == 404
    assert (
        site.get(f"/v2/team/secret/blobs/{noise_image('secret', 1000).layers[0].digest}").wait_for_end().status == 404
    )
    pull(site)


@pytest.mark.parametrize("auth", ["bearer", "basic"])
def test_refused_login_gives_403(site: MirrorSite, auth: str) -> None:
    """If the upstream refuses the mirror's login, clients get 403 DENIED. The log does not contain the password."""
    wrong_password = "wrong-pony-capacitor"
    (site.folder / "password").write_text(wrong_password)
    settings = f'username = "me"\npassword_file = "{site.folder / "password"}"\nrequire_grant = false'
    site.start(settings=settings, more='log_level = "debug"', auth=auth, username="me", password=PASSWORD)
    answer = site.http.get(f"/v2/{REPO}/manifests/1")
    assert (answer.status_code, answer.json()["errors"][0]["code"]) == (403, "DENIED")
    assert not_in_log(site, wrong_password, encoded("me", wrong_password))
    assert wrong_password not in answer.text


@pytest.mark.parametrize("auth", ["off", "bearer"])
def test_credentials_of_clients_are_not_forwarded(site: MirrorSite, auth: str) -> None:
    """The mirror does not forward the login or token of a client to the upstream, does not log it, and serves the
    client's pull."""
    login, token = encoded("stray", "login-of-a-client"), "stray-token-of-a-client"
    site.start(more='log_level = "debug"', auth=auth)
    for authorization in (f"Bearer {token}", f"Basic {login}", "Negotiate"):
        pull(site, {"Authorization": authorization})
        answer = site.get("/v2/team/none/manifests/1", headers={"Authorization": authorization}).wait_for_end()
        assert answer.status == 404
        assert site.http.delete(f"/v2/{REPO}/manifests/{site.image.digest}").status_code == 202
    assert not any(request.authorization for kind in ("token", "blob") for request in site.hub.requests(kind))
    if auth == "off":
        assert not any(request.authorization for request in site.hub.requests())
    assert not_in_log(site, login, token, "login-of-a-client")


def encoded(user: str, password: str) -> str:
    """Returns the user and password as in an Authorization header for Basic."""
    return base64.b64encode(f"{user}:{password}".encode()).decode()


def not_in_log(site: MirrorSite, *secrets: str) -> bool:
    """Returns whether none of the secrets is in the server's log."""
    text = site.server.log_text()
    return not any(secret in text for secret in secrets)


def test_if_none_match_of_mirrored_content(site: MirrorSite) -> None:
    """A request with the current digest in If-None-Match gets 304. This holds for a manifest that the mirror fetches
    for this request, and for a blob that is stored and verified. A request with another digest gets the content, also
    after the tag has moved."""
    site.start(settings='tag_ttl = "0s"\nprefetch = "off"')
    manifest, blob = f"/v2/{REPO}/manifests/1", site.path
    etag, blob_etag = f'"{site.image.digest}"', f'"{site.digest}"'
    unrelated = f'"sha256:{"0" * 64}"'
    for method in ("GET", "HEAD"):
        answer = site.http.request(method, manifest, headers={"If-None-Match": f"{unrelated}, W/{etag}"})
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", etag)
    assert site.hub.count("blob") == 0
    answer = site.http.get(manifest, headers={"If-None-Match": blob_etag})
    assert (answer.status_code, answer.content) == (200, site.image.body)
    answer = site.http.get(blob, headers={"If-None-Match": etag})
    assert (answer.status_code, answer.content) == (200, site.blob)
    for method in ("GET", "HEAD"):
        answer = site.http.request(method, blob, headers={"If-None-Match": f"{unrelated}, W/{blob_etag}"})
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", blob_etag)
    new_image = site.content.add(REPO, noise_image("moved", 2000), "1")
    site.hub.put(site.content)
    answer = site.http.get(manifest, headers={"If-None-Match": etag})
    assert (answer.status_code, answer.content) == (200, new_image.body)
    site.hub.refuse()
    answer = site.http.get(manifest, headers={"If-None-Match": f'"{new_image.digest}"'})
    assert (answer.status_code, answer.headers["warning"][:6]) == (304, "299 - ")


def test_if_none_match_of_unknown_content_gets_404(site: MirrorSite) -> None:
    """A request with If-None-Match for unknown content gets 404, like a request without a condition."""
    site.start()
    digest = "sha256:" + "0" * 64
    for path in (f"/v2/{REPO}/manifests/none", f"/v2/{REPO}/manifests/{digest}", f"/v2/{REPO}/blobs/{digest}"):
        answer = site.http.get(path, headers={"If-None-Match": f'"{digest}"'})
        assert answer.status_code == 404
