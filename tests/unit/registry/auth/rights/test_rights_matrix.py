"""The rights matrix over HTTP: principal x credential x repository x endpoint, against a table.

The table says in letters what each principal may do. `required_response` derives the response from the table, without
knowledge of the implementation. Each request is sent for an existing repository and for a missing one. If the request
is refused, both responses must be the same, byte for byte.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from storage.access import AccountName
from storage.content import OCI_MANIFEST, digest_of
from storage.names import RepositoryName, Tag, UploadID
from tests.fakes.app_in_process import AppInProcess, running_app
from tests.fakes.asgi_client import AsgiAnswer
from tests.fakes.registry_content import BY, descriptor_of, image_of, push_image
from tests.fakes.store_accounts import add_account, add_grant, limit

pytestmark = pytest.mark.slow

AREAS = ("team", "secret", "public", "shared")
TABLE = {
    # principal team secret public shared
    "nobody": ("", "", "r", ""),
    "plain": ("", "", "r", "r"),
    "reader": ("r", "", "r", "r"),
    "writer": ("rw", "", "r", "r"),
    "pusher": ("w", "", "r", "r"),
    "cleaner": ("rd", "", "r", "r"),
    "member": ("", "rwd", "r", "r"),
    "robot": ("rw", "r", "r", "r"),
    "limited": ("rw", "r", "r", "r"),
    "root": ("rwd", "rwd", "rwd", "rwd"),
}
"""For each principal, the rights on each area (the first part of a repository's name). Letters: r reads, w writes, d
deletes. `limited` is the robot with an API token that may only read `team/app`."""
SCOPES = {"whole": "pull,push,delete", "reading": "pull", "writing": "push"}
"""The actions that each kind of bearer token requests."""
CREDENTIALS = ("basic", "whole", "reading", "writing", "elsewhere")
"""The ways to authenticate. `basic` sends the login with each request. The others send a bearer token: for the actions
in SCOPES, or for another repository (`elsewhere`)."""


@dataclass(frozen=True)
class ApiCall:
    """One endpoint. `letter` is the right that it needs. `status_existing` and `status_missing` are the statuses of an
    allowed call on the existing and on the missing repository. `code` is the error code of a read that is refused with
    404. It is empty for the list of referrers: a refused request for this list gets 200 and an empty list. `harms`
    means that the call would change the content, so the test sends it only if it must be refused."""

    letter: str
    method: str
    path: str
    status_existing: int
    status_missing: int
    code: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    harms: bool = False


IMAGE = image_of(descriptor_of(b"config", "application/x.test"), [descriptor_of(b"layer")])
"""An image whose blobs no repository has. So an allowed push of its manifest gets 404 and changes nothing. It gets 412
if the condition of the request is not met."""
ABSENT = digest_of(b"nowhere")
SESSION = UploadID.random()


def endpoints(manifest: str, layer: str, other: str) -> list[ApiCall]:
    """Returns the calls that the tests send. `manifest` and `layer` are digests in the existing repository, and `other`
    is the id of an upload session of another account in it."""
    tag = "manifests/latest"
    conditional = {"if-none-match": f'"{layer}"'}
    put = {"content-type": OCI_MANIFEST}
    no_manifest, no_blob = "MANIFEST_UNKNOWN", "BLOB_UNKNOWN"
    calls = [
        ApiCall("r", method, path, 200, 404, code)
        for method in ("GET", "HEAD")
        for path, code in (
            (tag, no_manifest),
            (f"manifests/{manifest}", no_manifest),
            (f"blobs/{layer}", no_blob),
            ("tags/list", "NAME_UNKNOWN"),
            ("tags/list?n=1&last=a", "NAME_UNKNOWN"),
        )
    ]
    calls += [
        ApiCall("r", "GET", "manifests/none", 404, 404, no_manifest),
        ApiCall("r", "GET", f"blobs/{ABSENT}", 404, 404, no_blob),
        ApiCall("r", "GET", tag, 304, 404, no_manifest, {"if-none-match": f'"{manifest}"'}),
        ApiCall("r", "GET", f"blobs/{layer}", 304, 404, no_blob, conditional),
        ApiCall("r", "HEAD", f"blobs/{layer}", 304, 404, no_blob, conditional),
        ApiCall("r", "GET", f"blobs/{layer}", 206, 404, no_blob, {"range": "bytes=1-2"}),
        ApiCall("r", "GET", f"blobs/{layer}", 206, 404, no_blob, {"range": "bytes=0-0,2-3"}),
        ApiCall("r", "GET", f"blobs/{layer}", 416, 404, no_blob, {"range": "bytes=999-"}),
        ApiCall("r", "GET", f"blobs/{layer}", 412, 404, no_blob, {"if-match": '"x"'}),
        ApiCall("r", "GET", f"referrers/{manifest}", 200, 200),
        ApiCall("r", "GET", f"referrers/{manifest}?artifactType=application/x.test", 200, 200),
        ApiCall("w", "PUT", "manifests/new", 404, 404, headers=put, body=IMAGE.body),
        ApiCall("w", "PUT", f"manifests/{IMAGE.digest}?tag=new", 404, 404, headers=put, body=IMAGE.body),
        ApiCall("w", "PUT", "manifests/latest", 412, 404, headers={**put, "if-none-match": "*"}, body=IMAGE.body),
        ApiCall("w", "POST", "blobs/uploads/", 202, 202),
        ApiCall("w", "POST", f"blobs/uploads/?mount={layer}&from=secret/absent", 202, 202),
        ApiCall("w", "POST", f"blobs/uploads/?digest={ABSENT}", 400, 400, body=b"something else"),
        ApiCall("d", "DELETE", "manifests/none", 404, 404),
        ApiCall("d", "DELETE", f"manifests/{ABSENT}", 404, 404),
        ApiCall("d", "DELETE", f"blobs/{ABSENT}", 404, 404),
        ApiCall("d", "DELETE", tag, 202, 404, harms=True),
        ApiCall("d", "DELETE", f"manifests/{manifest}", 202, 404, harms=True),
        ApiCall("d", "DELETE", f"blobs/{layer}", 202, 404, harms=True),
    ]
    for session in (SESSION, other):
        for method in ("GET", "PATCH", "DELETE"):
            calls.append(ApiCall("w", method, f"blobs/uploads/{session}", 404, 404, body=b"x" * (method == "PATCH")))
        calls.append(ApiCall("w", "PUT", f"blobs/uploads/{session}?digest={ABSENT}", 404, 404, body=b"x"))
    return calls


@dataclass(frozen=True)
class Expected:
    """The expected status, the expected error code, and whether the request is refused. The code is None for an allowed
    request, and for a refused one that gets 200 and an empty list (`ApiCall.code`)."""

    status: int
    code: str | None = None
    refused: bool = True
    scope: bool = False
    """Whether the error in the challenge is `insufficient_scope`."""


def required_response(principal: str, credential: str, area: str, repository: str, endpoint: ApiCall) -> Expected:
    """Returns the response that the table requires. `repository` is "app" (exists) or "non" (does not exist)."""
    account = TABLE[principal][AREAS.index(area)]
    credential_letters = {"basic": "rwd", "whole": "rwd", "reading": "r", "writing": "w", "elsewhere": ""}[credential]
    if principal == "limited" and (area, repository) != ("team", "app"):
        credential_letters = ""
    elif principal == "limited":
        credential_letters = "r" if "r" in credential_letters else ""
    if endpoint.letter in account and endpoint.letter in credential_letters:
        return Expected(endpoint.status_existing if repository == "app" else endpoint.status_missing, refused=False)
    if endpoint.letter in account:
        return Expected(401, "UNAUTHORIZED", scope=True)
    if principal == "nobody":
        return Expected(401, "UNAUTHORIZED")
    if endpoint.letter != "r":
        return Expected(403, "DENIED")
    return Expected(404, endpoint.code) if endpoint.code else Expected(200, None)


class MatrixStore:
    """A registry with all principals of the table. Each area has a repository `app`, and none with the name `non`."""

    def __init__(self, service: AppInProcess) -> None:
        self.service = service
        self.logins: dict[str, str | None] = {"nobody": None}
        self.endpoints: dict[str, list[ApiCall]] = {}

    async def push_content(self) -> None:
        for area in AREAS:
            repo = RepositoryName(f"{area}/app")
            image = await push_image(self.service.hosted, repo, area, "latest")
            await push_image(self.service.hosted, repo, f"signature of {area}", "signature", subject=image.digest)
            session = await self.service.hosted.start_upload(repo, by=BY)
            await session.write(b"somebody's")
            await session.aclose()
            self.endpoints[area] = endpoints(image.digest, image.blobs[1].digest, session.id)

    async def add_principals(self) -> None:
        accounts = self.service.accounts
        for name in ("plain", "reader", "writer", "pusher", "cleaner", "member"):
            self.logins[name] = await self.service.user(name)
        self.logins["root"] = await self.service.user("root", admin=True)
        self.logins["robot"] = await self.service.user("robot", robot=True)
        self.logins["limited"] = await self.service.token("robot", [limit("team/app", "pull")])
        await accounts.add_group(AccountName("staff"), by=BY)
        await accounts.add_member(AccountName("staff"), AccountName("member"), by=BY)
        for subject, pattern, actions in (
            ("everyone", "public/**", "pull"),
            ("authenticated", "shared/*", "pull"),
            ("user:reader", "team/**", "pull"),
            ("user:writer", "team/**", "pull,push"),
            ("user:pusher", "team/**", "push"),
            ("user:cleaner", "team/**", "pull,delete"),
            ("group:staff", "secret/**", "*"),
            ("robot:robot", "team/**", "pull,push"),
            ("robot:robot", "secret/*", "pull"),
        ):
            await add_grant(accounts, subject, pattern, actions)

    async def authorization_headers(self, principal: str, credential: str, repo: str) -> dict[str, str]:
        """Returns the headers of a request by the principal with this kind of credential."""
        login = self.logins[principal]
        if credential == "basic":
            return {} if login is None else {"authorization": login}
        scope = (
            f"repository:{repo}:{SCOPES[credential]}"
            if credential in SCOPES
            else "repository:else/where:pull,push,delete"
        )
        return {"authorization": await self.service.bearer(login, scope)}


def calls(
    principal: str, credential: str, area: str, matrix: MatrixStore
) -> Iterator[tuple[ApiCall, Expected, Expected]]:
    """Yields each call with the expected responses for the existing and for the missing repository."""
    for endpoint in matrix.endpoints[area]:
        existing, missing = (
            required_response(principal, credential, area, repository, endpoint) for repository in ("app", "non")
        )
        if existing.refused or not endpoint.harms:
            yield endpoint, existing, missing


def check_response(answer: AsgiAnswer, expected: Expected, endpoint: ApiCall, repo: str) -> None:
    assert answer.status == expected.status, (answer.body, expected)
    assert len(answer.all("www-authenticate")) == (expected.status == 401)
    if not expected.refused:
        return
    assert not {"location", "docker-content-digest", "etag", "range", "content-range", "docker-upload-uuid", "link"} & {
        name for name, _ in answer.fields
    }
    if endpoint.method != "HEAD":
        if expected.code is None:
            assert json.loads(answer.body)["manifests"] == []
        else:
            assert answer.code == expected.code
    if expected.status == 401:
        challenge = answer["www-authenticate"]
        assert challenge.startswith('Bearer realm="http://127.0.0.1:5000/token",service="entrepot",scope="repository:')
        assert f"repository:{repo}:" in challenge
        assert challenge.endswith(',error="insufficient_scope"') == expected.scope


def comparable(answer: AsgiAnswer, repo: str) -> tuple[int, list[tuple[str, str]], bytes]:
    """Returns the parts of a response that must be the same for the existing and the missing repository."""
    fields = [(name, value.replace(repo, "NAME")) for name, value in answer.fields if name != "x-request-id"]
    return answer.status, fields, answer.body.replace(repo.encode(), b"NAME")


async def try_all(matrix: MatrixStore, principal: str, credential: str) -> int:
    """Sends every call as the principal with this kind of credential. Returns the number of requests."""
    sent_requests = 0
    for area in AREAS:
        authorization_headers = {
            repository: await matrix.authorization_headers(principal, credential, f"{area}/{repository}")
            for repository in ("app", "non")
        }
        for endpoint, *expected_responses in calls(principal, credential, area, matrix):
            answers = []
            for repository, expected in zip(("app", "non"), expected_responses, strict=True):
                repo = f"{area}/{repository}"
                headers = {**endpoint.headers, **authorization_headers[repository]}
                answer = await matrix.service.client(
                    endpoint.method, f"/v2/{repo}/{endpoint.path}", headers, endpoint.body
                )
                check_response(answer, expected, endpoint, repo)
                answers.append(comparable(answer, repo))
                sent_requests += 1
            # A call that is refused for the existing repository is refused in the same way for the missing one.
            if expected_responses[0].refused:
                assert answers[0] == answers[1], endpoint
    return sent_requests


@pytest.mark.parametrize("principal", sorted(TABLE))
async def test_every_response_is_as_the_table_says(tmp_path: Path, principal: str) -> None:
    """Every call gets the expected response. A refusal looks the same for existing and missing repositories. The
    content is unchanged at the end."""
    async with running_app(tmp_path / "data") as service:
        matrix = MatrixStore(service)
        await matrix.push_content()
        await matrix.add_principals()
        sent_requests = sum([await try_all(matrix, principal, credential) for credential in CREDENTIALS])
        assert sent_requests > 1000
        for area in AREAS:
            repo = RepositoryName(f"{area}/app")
            image = await service.hosted.get_manifest(repo, Tag("latest"))
            assert list((await service.hosted.tags(repo, None, 10)).items) == ["latest", "signature"]
            assert len((await service.hosted.referrers(repo, image.digest, None, None, 10)).items) == 1
            await service.hosted.resolve_blob(repo, image.blobs[1].digest)


async def test_the_catalog_has_the_repositories_that_may_be_pulled(tmp_path: Path) -> None:
    """For each principal, the catalog has the repositories from which the principal may pull. This holds with a login
    and with a bearer token, on one page and on several."""
    async with running_app(tmp_path / "data") as service:
        matrix = MatrixStore(service)
        await matrix.push_content()
        await matrix.add_principals()
        for principal, letters in TABLE.items():
            if principal == "nobody":
                answer = await service.client("GET", "/v2/_catalog")
                assert (answer.status, answer["www-authenticate"].partition(",scope=")[2]) == (
                    401,
                    '"registry:catalog:*"',
                )
                basic = None
            else:
                basic = matrix.logins[principal]
            bearer = await service.bearer(basic, "registry:catalog:*")
            readable = sorted(f"{area}/app" for area, some in zip(AREAS, letters, strict=True) if "r" in some)
            if principal == "limited":
                readable = ["team/app"]
            for login in filter(None, (basic, bearer)):
                headers = {"authorization": login}
                answer = await service.client("GET", "/v2/_catalog", headers)
                assert answer.json == {"repositories": readable}
                assert await list_by_pages(service, headers) == readable
            wrong_scope = {"authorization": await service.bearer(basic, "repository:public/app:pull")}
            answer = await service.client("GET", "/v2/_catalog", wrong_scope)
            assert (answer.status, answer.code) == (401, "UNAUTHORIZED")
            assert answer["www-authenticate"].endswith('scope="registry:catalog:*",error="insufficient_scope"')


async def list_by_pages(service: AppInProcess, headers: dict[str, str]) -> list[str]:
    repositories: list[str] = []
    target = "/v2/_catalog?n=1"
    while target:
        answer = await service.client("GET", target, headers)
        repositories += answer.json["repositories"]
        link = re.match(r"<(.*)>; rel", answer["link"]) if "link" in answer else None
        target = link[1] if link else ""
    return repositories


async def test_mounts_need_a_readable_source(tmp_path: Path) -> None:
    """A mount succeeds if the principal may read the source repository, or, without a source, any repository that has
    the blob. Otherwise an upload session begins."""
    async with running_app(tmp_path / "data") as service:
        matrix = MatrixStore(service)
        await matrix.push_content()
        await matrix.add_principals()
        number = 0
        for principal in ("writer", "pusher", "member", "robot", "root"):
            own = "team" if "w" in TABLE[principal][0] else "secret"
            for area in AREAS:
                layer = next(
                    each.path.removeprefix("blobs/")
                    for each in matrix.endpoints[area]
                    if each.path.startswith("blobs/sha")
                )
                readable = "r" in TABLE[principal][AREAS.index(area)]
                for source in (f"&from={area}/app", ""):
                    for credential in ("basic", "token"):
                        number += 1
                        repo = f"{own}/mount{number}"
                        scopes = (f"repository:{repo}:pull,push", f"repository:{area}/app:pull")
                        login = matrix.logins[principal]
                        assert login is not None
                        authorization = login if credential == "basic" else await service.bearer(login, *scopes)
                        answer = await service.client(
                            "POST",
                            f"/v2/{repo}/blobs/uploads/?mount={layer}{source}",
                            {"authorization": authorization},
                        )
                        assert answer.status == (201 if readable else 202), (principal, area, source, credential)


async def test_the_ping_needs_a_credential(tmp_path: Path) -> None:
    """`/v2/` answers 401 to a request without a credential, even if everyone may pull, because docker reads the
    challenge only in this response. Any valid token is accepted. As long as there are no accounts, no credential is
    needed."""
    async with running_app(tmp_path / "data") as service:
        assert (await service.client("GET", "/v2/")).status == 200
        await add_account(service.accounts, "alice")
        await add_grant(service.accounts, "everyone", "**", "pull")
        for path in ("/v2/", "/v2"):
            answer = await service.client("GET", path)
            assert (answer.status, answer.code) == (401, "UNAUTHORIZED")
            assert answer["www-authenticate"] == 'Bearer realm="http://127.0.0.1:5000/token",service="entrepot"'
        token = await service.bearer(None)
        assert (await service.client("GET", "/v2/", {"authorization": token})).status == 200
        answer = await service.client("GET", "/v2/", {"authorization": token[:-3] + "abc"})
        assert answer.status == 401
        assert answer["www-authenticate"].endswith('error="invalid_token"')
