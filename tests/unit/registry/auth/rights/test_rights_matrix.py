"""The rights matrix over HTTP: principal x credential x repository x endpoint, against a table.

The table says in letters what each principal may do. `expected` derives the response from the table, without knowledge
of the implementation. Each request is sent for an existing repository and for a missing one. If it is refused, both
responses are the same, byte for byte.
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
    # who      team  secret public shared
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
"""Letters: r reads, w writes, d deletes. `limited` is a token of the robot's that may read `team/app`."""
SCOPES = {"whole": "pull,push,delete", "reading": "pull", "writing": "push"}
WAYS = ("basic", "whole", "reading", "writing", "elsewhere")
"""The ways to authenticate: `basic` with each request, the others with a bearer token made from that credential."""


@dataclass(frozen=True)
class ApiCall:
    """One endpoint. `there` and `missing`: the statuses of an allowed call on the existing and on the missing
    repository. `code`: the error code of a refused read; empty: a refused read gets an empty list. `harms`: the call
    would change the content, so the test sends it only if it must be refused."""

    letter: str
    method: str
    path: str
    there: int
    missing: int
    code: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    harms: bool = False


IMAGE = image_of(descriptor_of(b"config", "application/x.test"), [descriptor_of(b"layer")])
ABSENT = digest_of(b"nowhere")
SESSION = UploadID.random()


def endpoints(manifest: str, layer: str, other: str) -> list[ApiCall]:
    """Returns the endpoints. `manifest` and `layer` are digests in the existing repository; `other` is an upload
    session in it."""
    tag = "manifests/latest"
    conditional = {"if-none-match": f'"{layer}"'}
    put = {"content-type": OCI_MANIFEST}
    no_manifest, no_blob = "MANIFEST_UNKNOWN", "BLOB_UNKNOWN"
    found = [
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
    found += [
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
            found.append(ApiCall("w", method, f"blobs/uploads/{session}", 404, 404, body=b"x" * (method == "PATCH")))
        found.append(ApiCall("w", "PUT", f"blobs/uploads/{session}?digest={ABSENT}", 404, 404, body=b"x"))
    return found


@dataclass(frozen=True)
class Expected:
    """An answer's status, its error code, and whether it is a refusal."""

    status: int
    code: str | None = None
    refused: bool = True
    scope: bool = False
    """True if the answer is `insufficient_scope`."""


def expected(who: str, way: str, area: str, twin: str, endpoint: ApiCall) -> Expected:
    """Returns the response that the policy requires."""
    account = TABLE[who][AREAS.index(area)]
    shown = {"basic": "rwd", "whole": "rwd", "reading": "r", "writing": "w", "elsewhere": ""}[way]
    if who == "limited" and (area, twin) != ("team", "app"):
        shown = ""
    elif who == "limited":
        shown = "r" if "r" in shown else ""
    if endpoint.letter in account and endpoint.letter in shown:
        return Expected(endpoint.there if twin == "app" else endpoint.missing, refused=False)
    if endpoint.letter in account:
        return Expected(401, "UNAUTHORIZED", scope=True)
    if who == "nobody":
        return Expected(401, "UNAUTHORIZED")
    if endpoint.letter != "r":
        return Expected(403, "DENIED")
    return Expected(404, endpoint.code) if endpoint.code else Expected(200, None)


class MatrixStore:
    """A store with four areas, each with an existing repository `app` and a missing one `non`, and all principals of
    the table."""

    def __init__(self, service: AppInProcess) -> None:
        self.service = service
        self.logins: dict[str, str | None] = {"nobody": None}
        self.endpoints: dict[str, list[ApiCall]] = {}

    async def fill(self) -> None:
        for area in AREAS:
            repo = RepositoryName(f"{area}/app")
            image = await push_image(self.service.hosted, repo, area, "latest")
            await push_image(self.service.hosted, repo, f"signature of {area}", "signature", subject=image.digest)
            session = await self.service.hosted.start_upload(repo, by=BY)
            await session.write(b"somebody's")
            await session.aclose()
            self.endpoints[area] = endpoints(image.digest, image.blobs[1].digest, session.id)

    async def people(self) -> None:
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

    async def shown(self, who: str, way: str, repo: str) -> dict[str, str]:
        """Returns the headers of a principal that authenticates in one of the ways."""
        login = self.logins[who]
        if way == "basic":
            return {} if login is None else {"authorization": login}
        scope = f"repository:{repo}:{SCOPES[way]}" if way in SCOPES else "repository:else/where:pull,push,delete"
        return {"authorization": await self.service.bearer(login, scope)}


def cells(who: str, way: str, area: str, world: MatrixStore) -> Iterator[tuple[ApiCall, Expected, Expected]]:
    for endpoint in world.endpoints[area]:
        there, missing = (expected(who, way, area, twin, endpoint) for twin in ("app", "non"))
        if there.refused or not endpoint.harms:
            yield endpoint, there, missing


def check(answer: AsgiAnswer, wanted: Expected, endpoint: ApiCall, repo: str) -> None:
    assert answer.status == wanted.status, (answer.body, wanted)
    assert len(answer.all("www-authenticate")) == (wanted.status == 401)
    if not wanted.refused:
        return
    assert not {"location", "docker-content-digest", "etag", "range", "content-range", "docker-upload-uuid", "link"} & {
        name for name, _ in answer.fields
    }
    if endpoint.method != "HEAD":
        if wanted.code is None:
            assert json.loads(answer.body)["manifests"] == []
        else:
            assert answer.code == wanted.code
    if wanted.status == 401:
        challenge = answer["www-authenticate"]
        assert challenge.startswith('Bearer realm="http://127.0.0.1:5000/token",service="entrepot",scope="repository:')
        assert f"repository:{repo}:" in challenge
        assert challenge.endswith(',error="insufficient_scope"') == wanted.scope


def told(answer: AsgiAnswer, repo: str) -> tuple[int, list[tuple[str, str]], bytes]:
    """Returns all of an answer but the parts that differ between requests."""
    fields = [(name, value.replace(repo, "NAME")) for name, value in answer.fields if name != "x-request-id"]
    return answer.status, fields, answer.body.replace(repo.encode(), b"NAME")


async def try_all(world: MatrixStore, who: str, way: str) -> int:
    """Tries every cell of a principal and a way to authenticate. Returns the number of cells."""
    tried = 0
    for area in AREAS:
        shown = {twin: await world.shown(who, way, f"{area}/{twin}") for twin in ("app", "non")}
        for endpoint, *wanted in cells(who, way, area, world):
            answers = []
            for twin, want in zip(("app", "non"), wanted, strict=True):
                repo = f"{area}/{twin}"
                headers = {**endpoint.headers, **shown[twin]}
                answer = await world.service.client(
                    endpoint.method, f"/v2/{repo}/{endpoint.path}", headers, endpoint.body
                )
                check(answer, want, endpoint, repo)
                answers.append(told(answer, repo))
                tried += 1
            if wanted[0].refused and wanted[0] == wanted[1]:
                assert answers[0] == answers[1], endpoint
    return tried


@pytest.mark.parametrize("who", sorted(TABLE))
async def test_every_cell_is_as_the_policy_says(tmp_path: Path, who: str) -> None:
    """Every cell has the expected answer, a refusal looks the same for existing and missing repositories, and the
    content is unchanged at the end."""
    async with running_app(tmp_path / "data") as service:
        world = MatrixStore(service)
        await world.fill()
        await world.people()
        tried = sum([await try_all(world, who, way) for way in WAYS])
        assert tried > 1000
        for area in AREAS:
            repo = RepositoryName(f"{area}/app")
            image = await service.hosted.get_manifest(repo, Tag("latest"))
            assert list((await service.hosted.tags(repo, None, 10)).items) == ["latest", "signature"]
            assert len((await service.hosted.referrers(repo, image.digest, None, None, 10)).items) == 1
            await service.hosted.resolve_blob(repo, image.blobs[1].digest)


async def test_lists_show_what_may_be_pulled(tmp_path: Path) -> None:
    """The catalog shows each principal the repositories it may pull, by login and by token, page by page."""
    async with running_app(tmp_path / "data") as service:
        world = MatrixStore(service)
        await world.fill()
        await world.people()
        for who, letters in TABLE.items():
            if who == "nobody":
                answer = await service.client("GET", "/v2/_catalog")
                assert (answer.status, answer["www-authenticate"].partition(",scope=")[2]) == (
                    401,
                    '"registry:catalog:*"',
                )
                basic = None
            else:
                basic = world.logins[who]
            bearer = await service.bearer(basic, "registry:catalog:*")
            mine = sorted(f"{area}/app" for area, some in zip(AREAS, letters, strict=True) if "r" in some)
            if who == "limited":
                mine = ["team/app"]
            for login in filter(None, (basic, bearer)):
                headers = {"authorization": login}
                answer = await service.client("GET", "/v2/_catalog", headers)
                assert answer.json == {"repositories": mine}
                assert await by_pages(service, headers) == mine
            short = {"authorization": await service.bearer(basic, "repository:public/app:pull")}
            answer = await service.client("GET", "/v2/_catalog", short)
            assert (answer.status, answer.code) == (401, "UNAUTHORIZED")
            assert answer["www-authenticate"].endswith('scope="registry:catalog:*",error="insufficient_scope"')


async def by_pages(service: AppInProcess, headers: dict[str, str]) -> list[str]:
    found: list[str] = []
    target = "/v2/_catalog?n=1"
    while target:
        answer = await service.client("GET", target, headers)
        found += answer.json["repositories"]
        link = re.match(r"<(.*)>; rel", answer["link"]) if "link" in answer else None
        target = link[1] if link else ""
    return found


async def test_mounts_open_nothing(tmp_path: Path) -> None:
    """A mount succeeds from a repository that the principal may read; from others, and without a source, an upload
    session begins."""
    async with running_app(tmp_path / "data") as service:
        world = MatrixStore(service)
        await world.fill()
        await world.people()
        number = 0
        for who in ("writer", "pusher", "member", "robot", "root"):
            own = "team" if "w" in TABLE[who][0] else "secret"
            for area in AREAS:
                layer = next(
                    each.path.removeprefix("blobs/")
                    for each in world.endpoints[area]
                    if each.path.startswith("blobs/sha")
                )
                readable = "r" in TABLE[who][AREAS.index(area)]
                for source in (f"&from={area}/app", ""):
                    for way in ("basic", "token"):
                        number += 1
                        repo = f"{own}/mount{number}"
                        scopes = (f"repository:{repo}:pull,push", f"repository:{area}/app:pull")
                        login = world.logins[who]
                        assert login is not None
                        shown = login if way == "basic" else await service.bearer(login, *scopes)
                        answer = await service.client(
                            "POST", f"/v2/{repo}/blobs/uploads/?mount={layer}{source}", {"authorization": shown}
                        )
                        assert answer.status == (201 if readable else 202), (who, area, source, way)


async def test_the_ping_asks_who_has_shown_nothing(tmp_path: Path) -> None:
    """`/v2/` answers 401 to a request without a credential, even if everyone may pull, because docker reads the
    challenge only there. Any valid token is enough."""
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
