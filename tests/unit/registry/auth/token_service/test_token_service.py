"""The endpoint `/token` over HTTP, which issues bearer tokens. The tests use a store on disk and the policy."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx2
import pytest
from fastapi import FastAPI

from registry.admin.token_endpoint import MAX_FORM_BYTES, token_router
from registry.auth.authorization_header import INVALID_CREDENTIALS, Basic
from registry.auth.password.hashing import hash_password
from registry.auth.rights.principal import CATALOG, Identity
from registry.auth.token_service.scopes import parse_scopes
from registry.auth.token_service.service import TokenRequest
from registry.naming import NamingRules
from storage.access import Action
from storage.errors import StorageFailed, StorageFull, Unauthorized
from tests.fakes.auth_worker import ADMIN, ALICE, CI, KNOWN_ADDRESS, PASSWORD, AuthClock, AuthWorker, auth_worker, basic
from tests.fakes.token_issuer import AUDIENCE, ISSUER, IssuerKey, key_set, key_set_server

SERVICE = "entrepot"
FORM = "application/x-www-form-urlencoded"


@asynccontextmanager
async def client_of(worker: AuthWorker, **policy: Any) -> AsyncIterator[httpx2.AsyncClient]:
    app = FastAPI()
    service = worker.service(**policy)
    app.include_router(token_router(lambda request: service))
    transport = httpx2.ASGITransport(app, client=("192.0.2.1", 1234))
    async with httpx2.AsyncClient(transport=transport, base_url="http://registry.test") as client:
        yield client


@pytest.fixture
async def client(worker: AuthWorker) -> AsyncIterator[httpx2.AsyncClient]:
    """Yields a client of `/token`. Everyone may pull from `public/**`. The user alice may pull from and push to
    `team/**`, and the robot ci may pull from there."""
    await worker.add_robot()
    await worker.grant("everyone", "public/**", "pull")
    await worker.grant("user:alice", "team/**", "pull,push")
    await worker.grant("robot:ci", "team/**", "pull")
    async with client_of(worker) as token_client:
        yield token_client


async def get(client: httpx2.AsyncClient, *scopes: str, login: str | None = None, **query: str) -> httpx2.Response:
    parameters = [("service", SERVICE), *(("scope", scope) for scope in scopes), *query.items()]
    return await client.get(f"/token?{urlencode(parameters)}", headers={"authorization": login} if login else {})


async def post(client: httpx2.AsyncClient, **form: str) -> httpx2.Response:
    return await client.post("/token", data={"service": SERVICE, "client_id": "docker", **form})


async def identity_in(worker: AuthWorker, answer: httpx2.Response) -> Identity:
    """Verifies the bearer token in a response and returns its identity."""
    assert answer.status_code == 200, answer.text
    return await worker.access.credential_verifier.verify_bearer(answer.json()["token"], KNOWN_ADDRESS)


def check_refused(answer: httpx2.Response) -> None:
    assert answer.status_code == 401
    assert answer.json()["errors"] == [{"code": "UNAUTHORIZED", "message": "the credentials are not valid"}]
    assert answer.headers["www-authenticate"].startswith("Basic realm=")
    assert answer.headers["cache-control"] == "no-store"


async def test_the_fields_of_a_response(worker: AuthWorker, client: httpx2.AsyncClient) -> None:
    """The response has all fields that clients read. `expires_in` is the lifetime of the token. The response must not
    be cached."""
    answer = await get(client, "repository:team/app:pull", login=basic("alice", PASSWORD), account="alice")
    document = answer.json()
    assert document["token"] == document["access_token"]
    assert document["expires_in"] == 300
    issued = datetime.fromisoformat(document["issued_at"])
    assert issued.timestamp() == int(worker.clock())
    assert issued.tzinfo
    assert "refresh_token" not in document
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["content-type"] == "application/json"
    proof = await identity_in(worker, answer)
    assert (proof.name, proof.access) == (ALICE, {"team/app": Action.PULL})


async def test_a_token_has_the_allowed_actions(worker: AuthWorker, client: httpx2.AsyncClient) -> None:
    """A token has those of the requested actions that the client may do. The client can send the scopes in one
    parameter or in several."""
    scopes = ("repository:team/app:pull,push,delete", "repository:public/a:pull,push repository:other:pull")
    for login, granted in (
        (None, {"public/a": Action.PULL}),
        (basic("alice", PASSWORD), {"team/app": Action.PULL | Action.PUSH, "public/a": Action.PULL}),
    ):
        assert (await identity_in(worker, await get(client, *scopes, login=login))).access == granted


async def test_tokens_without_a_login(worker: AuthWorker, client: httpx2.AsyncClient) -> None:
    """A request without a login gets a token for the actions that everyone may do. If there are none, the token allows
    nothing."""
    for scopes, granted in (
        ((), {}),
        (("repository:team/app:pull",), {}),
        (("repository:public/app:pull",), {"public/app": Action.PULL}),
        (("registry:catalog:*",), {CATALOG: Action.PULL}),
        (("nonsense",), {}),
    ):
        proof = await identity_in(worker, await get(client, *scopes))
        assert (proof.name, proof.access) == (None, granted)


async def test_docker_login_gets_a_refresh_token(worker: AuthWorker, client: httpx2.AsyncClient) -> None:
    """`docker login` requests no scope. With the right password it gets a token and a refresh token. With a wrong
    password it is refused. The refresh token can be exchanged for bearer tokens until it is revoked."""
    query = {"account": "alice", "client_id": "docker", "offline_token": "true"}
    good = await get(client, login=basic("alice", PASSWORD), **query)
    assert (await identity_in(worker, good)).access == {}
    refresh = good.json()["refresh_token"]
    check_refused(await get(client, login=basic("alice", "a wrong password"), **query))
    [token] = worker.accounts.tokens(ALICE, None, 10).items
    assert (token.purpose, token.note) == ("login", "docker at 192.0.2.1")
    assert token.expires == worker.clock() + 90 * 86400

    form = {"grant_type": "refresh_token", "refresh_token": refresh, "scope": "repository:team/app:pull,push"}
    answer = await post(client, **form)
    assert answer.json()["scope"] == "repository:team/app:pull,push"
    assert "refresh_token" not in answer.json()
    proof = await identity_in(worker, answer)
    assert (proof.name, proof.token) == (ALICE, token.id)
    await worker.accounts.revoke_token(token.id, by=ADMIN)
    check_refused(await post(client, **form))
    with pytest.raises(Unauthorized):
        await identity_in(worker, answer)


async def test_login_on_a_full_disk(
    worker: AuthWorker, client: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the disk is too full for a refresh token, `docker login` with the right password succeeds, without a refresh
    token. A wrong password is still refused. After any other error of the store, the login fails, because the client
    would store the password instead of a token."""
    error: Exception = StorageFull()

    async def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(worker.accounts, "add_token", refuse)
    query = {"account": "alice", "client_id": "docker", "offline_token": "true"}
    answer = await get(client, login=basic("alice", PASSWORD), **query)
    assert (await identity_in(worker, answer)).name == ALICE
    assert "refresh_token" not in answer.json()
    check_refused(await get(client, login=basic("alice", "a wrong password"), **query))
    error = StorageFailed("the disk")
    assert (await get(client, login=basic("alice", PASSWORD), **query)).status_code == 500


async def test_foreign_login_on_a_full_disk(
    worker: AuthWorker, client: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is so full that a failed login cannot be counted. A client with a login for another registry still gets
    a token for what everyone may pull, as docker does that sends its login for Docker Hub to a mirror. For other
    content, the error says that the disk is full."""

    async def refuse(*_: object, **__: object) -> None:
        raise StorageFull

    monkeypatch.setattr(worker.accounts, "add_failures", refuse)
    answer = await get(client, "repository:public/app:pull", login=basic("someone", "of docker hub"))
    assert (await identity_in(worker, answer)).name is None
    answer = await get(client, "repository:team/app:pull", login=basic("other", "of docker hub"))
    assert answer.status_code == 507


async def test_a_new_password_ends_tokens(worker: AuthWorker, client: httpx2.AsyncClient) -> None:
    """After a change of the password, refresh tokens and bearer tokens that were issued for the old password are
    refused."""
    answer = await get(client, login=basic("alice", PASSWORD), offline_token="true")
    await worker.accounts.set_password(ALICE, hash_password("another password"), by=ADMIN)
    check_refused(await post(client, grant_type="refresh_token", refresh_token=answer.json()["refresh_token"]))
    with pytest.raises(Unauthorized):
        await identity_in(worker, answer)


async def test_logins_during_a_change_of_the_password_get_no_refresh_token(worker: AuthWorker) -> None:
    """Logins with the old password that run while the password is changed are refused, and leave no refresh token."""
    service = worker.service()
    login = TokenRequest(Basic(ALICE, PASSWORD), parse_scopes([]), offline=True)
    assert (await service.answer(login, KNOWN_ADDRESS)).refresh
    _, *outcomes = await asyncio.gather(
        worker.accounts.set_password(ALICE, hash_password("another password"), by=ADMIN),
        *(service.answer(login, KNOWN_ADDRESS) for _ in range(10)),
        return_exceptions=True,
    )
    assert [type(outcome) for outcome in outcomes] == [Unauthorized] * 10
    assert {str(outcome) for outcome in outcomes} == {INVALID_CREDENTIALS}
    assert worker.accounts.tokens(ALICE, None, 100).items == []


async def test_a_refresh_token_expires(worker: AuthWorker, client: httpx2.AsyncClient) -> None:
    """A refresh token expires after 90 days."""
    answer = await get(client, login=basic("alice", PASSWORD), offline_token="true")
    form = {"grant_type": "refresh_token", "refresh_token": answer.json()["refresh_token"]}
    worker.clock.now += 90 * 86400 - 1
    assert (await post(client, **form)).status_code == 200
    worker.clock.now += 1
    check_refused(await post(client, **form))


async def test_anonymous_clients_and_api_tokens_get_no_refresh_token(
    worker: AuthWorker, client: httpx2.AsyncClient
) -> None:
    """An anonymous client gets no refresh token. A login with an API token gets none either. Otherwise the access would
    continue after the API token is revoked."""
    api_token = await worker.add_token(CI)
    for login in (None, basic("ci", api_token.text)):
        answer = await get(client, login=login, offline_token="true")
        assert answer.status_code == 200
        assert "refresh_token" not in answer.json()
    assert (await post(client, grant_type="refresh_token", refresh_token=api_token.text)).status_code == 200
    assert len(worker.accounts.tokens(None, None, 10).items) == 1


async def test_a_robot_logs_in_with_an_api_token(worker: AuthWorker, client: httpx2.AsyncClient) -> None:
    """A robot logs in with an API token in place of the password, by GET and by POST."""
    api_token = await worker.add_token(CI)
    scope = "repository:team/app:pull,push"
    for answer in (
        await get(client, scope, login=basic("ci", api_token.text)),
        await post(client, grant_type="password", username="ci", password=api_token.text, scope=scope),
    ):
        proof = await identity_in(worker, answer)
        assert (proof.name, proof.robot, proof.access) == (CI, True, {"team/app": Action.PULL})


async def test_the_requests_of_containerd(worker: AuthWorker, client: httpx2.AsyncClient) -> None:
    """containerd sends a POST with a password, and with several scopes in one parameter. The response to a wrong
    password has the error fields of both specifications (OAuth and Distribution). Its status, 401, makes containerd try
    GET."""
    scope = "repository:team/app:pull repository:public/base:pull"
    form = {"grant_type": "password", "username": "alice", "scope": scope}
    answer = await post(client, **form, password=PASSWORD, access_type="offline")
    assert answer.json()["scope"] == scope
    assert answer.json()["refresh_token"]
    assert (await identity_in(worker, answer)).access == {"team/app": Action.PULL, "public/base": Action.PULL}
    wrong = await post(client, **form, password="a wrong password")
    check_refused(wrong)
    assert wrong.json()["error"] == "invalid_grant"
    assert wrong.json()["error_description"]


PULL, PUSH = "repository:public/app:pull", "repository:public/app:pull,push"


@pytest.mark.parametrize("user", ["alice", "a-stranger", "Not A Name"])
@pytest.mark.parametrize(
    ("scopes", "status"),
    [
        ((), 401),
        ((PULL,), 200),
        ((PULL, "repository:public/base:pull"), 200),
        ((PUSH,), 401),
        (("repository:public/app:*",), 401),
        ((PULL, "repository:team/app:pull"), 401),
        (("repository:team/app:pull",), 401),
        ((PULL, "registry:catalog:*"), 401),
        ((PULL, "nonsense"), 401),
    ],
)
@pytest.mark.slow
async def test_wrong_credentials_get_at_most_an_anonymous_token(
    worker: AuthWorker, client: httpx2.AsyncClient, user: str, scopes: tuple[str, ...], status: int
) -> None:
    """With wrong credentials, a request gets an anonymous token if it is only for pulls that everyone may do. Every
    other request is refused. This holds whether or not the account exists."""
    form = {"grant_type": "password", "username": user, "password": "of another registry", "scope": " ".join(scopes)}
    for answer in (
        await get(client, *scopes, login=basic(user, "of another registry"), offline_token="true"),
        await post(client, **form, access_type="offline"),
    ):
        if status == 401:
            check_refused(answer)
        else:
            assert (await identity_in(worker, answer)).name is None
            assert "refresh_token" not in answer.json()


@pytest.mark.slow
async def test_many_machines_send_logins_for_another_registry(
    worker: AuthWorker, client: httpx2.AsyncClient, hashed: list[bytes]
) -> None:
    """Many machines at one address send their logins for another registry with each pull, while the rights here change.
    Other clients at this address can still log in, and each login is hashed only once."""
    for _ in range(20):
        for number in range(40):
            answer = await get(client, PULL, login=basic(f"hubuser{number}", "hub password"))
            assert (await identity_in(worker, answer)).name is None
        await worker.grant("user:alice", "team/**", "pull,push")
        worker.clock.now += 61
        assert (await get(client, login=basic("alice", PASSWORD))).status_code == 200
    assert hashed == [b"hub password"] * 40 + [PASSWORD.encode()]


@pytest.mark.slow
async def test_a_login_for_another_registry_does_not_prevent_public_pulls(
    worker: AuthWorker, client: httpx2.AsyncClient
) -> None:
    """A machine that sends its login for another registry with every pull can always pull what everyone may pull. A
    client that guesses passwords gets 429 for all other requests, and Retry-After says for how long."""
    for _ in range(150):
        assert (await get(client, PULL, login=basic("hubuser", "hub password"))).status_code == 200
    for attempt in range(10):
        check_refused(await get(client, login=basic("alice", f"guess number {attempt}")))
    slowed = await get(client, login=basic("alice", "one guess more"))
    assert slowed.status_code == 429
    assert slowed.json()["errors"][0]["code"] == "TOOMANYREQUESTS"
    assert int(slowed.headers["retry-after"]) == 30
    assert (await get(client, PULL, login=basic("alice", "one guess more"))).status_code == 200
    posted = await post(client, grant_type="password", username="alice", password="one guess more")
    assert (posted.status_code, posted.json()["error"]) == (429, "slow_down")


@pytest.mark.parametrize("login", ["", "Basic", "Basic !", "Basic bm9jb2xvbg==", "Digest x", "Basic /////w=="])
async def test_a_malformed_login_is_refused(client: httpx2.AsyncClient, login: str) -> None:
    """A malformed Authorization header is refused like a wrong password, whatever scopes are requested."""
    for scopes in ((), (PULL,)):
        parameters = [("scope", scope) for scope in scopes]
        check_refused(await client.get(f"/token?{urlencode(parameters)}", headers={"authorization": login}))


async def test_a_bearer_token_cannot_be_exchanged_for_another(worker: AuthWorker, client: httpx2.AsyncClient) -> None:
    """A bearer token of this registry cannot be exchanged for a new one, because access would then never expire."""
    text = (await get(client, login=basic("alice", PASSWORD))).json()["token"]
    check_refused(await get(client, "repository:team/app:pull", login=f"Bearer {text}"))
    check_refused(await get(client, "repository:team/app:pull", login=basic("alice", text)))
    check_refused(await post(client, grant_type="refresh_token", refresh_token=text))


async def test_an_issuers_token_can_be_exchanged(tmp_path: Path, clock: AuthClock) -> None:
    """A token of a trusted issuer can be exchanged for a bearer token. The client can send it as a bearer credential or
    as the robot's password. It gets no refresh token."""
    key = IssuerKey("one")
    async with key_set_server() as key_server:
        key_server.body = key_set(key.jwk())
        table = {"issuer": ISSUER, "audience": AUDIENCE, "account": "ci", "jwks_url": key_server.url}
        async with auth_worker(tmp_path / "data", clock, {"issuer": [table]}) as worker:
            await worker.add_robot()
            await worker.grant("robot:ci", "team/**", "push")
            text = key.sign({"iss": ISSUER, "aud": AUDIENCE, "exp": clock() + 120})
            async with client_of(worker) as client:
                for login in (f"Bearer {text}", basic("ci", text)):
                    answer = await get(client, "repository:team/app:pull,push", login=login, offline_token="true")
                    assert "refresh_token" not in answer.json()
                    assert answer.json()["expires_in"] <= 130
                    proof = await identity_in(worker, answer)
                    assert (proof.name, proof.access) == (CI, {"team/app": Action.PUSH})


@pytest.mark.parametrize(("service", "status"), [(SERVICE, 200), ("", 200), (None, 200), ("registry.docker.io", 400)])
async def test_the_service_of_a_request(client: httpx2.AsyncClient, service: str | None, status: int) -> None:
    """A request for a token of another service is refused, and the error names this registry's service. A request
    without a service gets a token of this registry."""
    answer = await client.get("/token", params={} if service is None else {"service": service})
    assert answer.status_code == status
    if status == 400:
        assert "entrepot" in answer.json()["errors"][0]["message"]


FORMS: list[tuple[str, str, int, str]] = [
    ("", FORM, 400, "invalid_request"),
    ("grant_type=", FORM, 400, "unsupported_grant_type"),
    ("grant_type=client_credentials", FORM, 400, "unsupported_grant_type"),
    ("grant_type=password&grant_type=password", FORM, 400, "invalid_request"),
    ("grant_type=password&username=%zz", FORM, 400, "invalid_request"),
    ("grant_type=password&username=%ff", FORM, 400, "invalid_request"),
    ("grant_type=password", FORM, 401, "invalid_grant"),
    ("grant_type=refresh_token", FORM, 401, "invalid_grant"),
    ("grant_type=password&username=alice&password=%00", FORM, 400, "invalid_request"),
    ("grant_type=password&x=" + "x" * MAX_FORM_BYTES, FORM, 413, "invalid_request"),
    ('{"grant_type": "password"}', "application/json", 400, "invalid_request"),
    ("grant_type=password", "", 400, "invalid_request"),
]


@pytest.mark.parametrize(("body", "content_type", "status", "error"), FORMS, ids=range(len(FORMS)))
async def test_a_malformed_form_gets_an_error(
    client: httpx2.AsyncClient, body: str, content_type: str, status: int, error: str
) -> None:
    """A malformed form gets an error that describes the problem and repeats nothing of the form."""
    answer = await client.post("/token", content=body, headers={"content-type": content_type} if content_type else {})
    assert answer.status_code == status
    assert answer.json()["error"] == error
    assert answer.json()["errors"]
    assert answer.headers["cache-control"] == "no-store"


@pytest.mark.slow
async def test_a_form_may_name_a_charset(worker: AuthWorker, client: httpx2.AsyncClient) -> None:
    """The Content-Type of a form may name a charset, as containerd's does. A password in a form may have any
    characters, and '+' means a space."""
    await worker.accounts.set_password(ALICE, hash_password("pass wörd&=%+"), by=ADMIN)
    body = urlencode({"grant_type": "password", "username": "alice", "password": "pass wörd&=%+"})
    assert "+" in body
    answer = await client.post("/token", content=body, headers={"content-type": f"{FORM}; charset=utf-8"})
    assert (await identity_in(worker, answer)).name == ALICE


async def test_too_many_scopes_are_refused(client: httpx2.AsyncClient) -> None:
    """A request for too many repositories is refused, because the token would not fit into a header."""
    answer = await get(client, " ".join(f"repository:a{n}:pull" for n in range(101)))
    assert answer.status_code == 400


async def test_the_largest_token_fits_into_a_header(worker: AuthWorker, client: httpx2.AsyncClient) -> None:
    """The largest token that can be issued is accepted, and fits into the headers of a request."""
    await worker.grant("everyone", "**", "pull,push,delete")
    scopes = " ".join(f"repository:{'a' * 76}{n}:pull,push,delete" for n in range(100))
    answer = await post(client, grant_type="password", username="alice", password=PASSWORD, scope=scopes)
    assert len((await identity_in(worker, answer)).access or {}) == 100
    assert len(answer.json()["token"]) < 24 * 1024  # all headers of a request may have 32 KiB


async def test_scopes_for_mirrored_repositories(worker: AuthWorker) -> None:
    """A scope has the name that the client used, without the upstream that the client names in `ns`. A grant on a
    mirrored repository, whose stored name begins with the upstream, allows a pull under the client's name, but no
    push."""
    await worker.grant("user:alice", "docker.io/**", "pull,push")
    async with client_of(worker, naming=NamingRules(["docker.io"])) as client:
        answer = await get(client, "repository:library/ubuntu:pull,push", login=basic("alice", PASSWORD))
        assert (await identity_in(worker, answer)).access == {"library/ubuntu": Action.PULL}
        assert (await identity_in(worker, await get(client, "repository:library/ubuntu:pull"))).access == {}


async def test_responses_do_not_tell_whether_an_account_exists(client: httpx2.AsyncClient) -> None:
    """The responses to a wrong password and to an unknown account differ only in their request ids."""
    answers = []
    for user in ("alice", "a-stranger"):
        answer = await get(client, "repository:team/app:pull", login=basic(user, "a wrong password"))
        headers = {name: value for name, value in answer.headers.items() if name != "x-request-id"}
        answers.append((answer.status_code, answer.content, headers))
    assert answers[0] == answers[1]
