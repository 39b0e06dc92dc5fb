"""Tokens of others: whose are taken, for whom, and how their keys are had."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from pydantic import ValidationError

from registry.auth.external import identity_http, jwks
from registry.auth.external.jwks import FRESH_SECONDS, REFRESH_SECONDS, RETRY_SECONDS, STALE_SECONDS
from registry.auth.rights.management_rights import management_rights_of
from registry.auth.rights.policy import Policy
from registry.config.auth_settings import Issuer
from storage.access import AccountName
from storage.errors import Denied, Unauthorized
from tests.fakes.auth_worker import ADMIN, ALICE, AT_HOME, CI, AuthClock, AuthWorker, auth_worker
from tests.fakes.token_issuer import AUDIENCE, ISSUER, IssuerKey, KeySetServer, key_set, key_set_server


@pytest.fixture(scope="module")
def key() -> IssuerKey:
    return IssuerKey("one")


@pytest.fixture(scope="module")
def other_key() -> IssuerKey:
    return IssuerKey("two")


@pytest.fixture(scope="module")
def rsa_key() -> IssuerKey:
    return IssuerKey("rsa", "RS256")


def claims(clock: AuthClock, **more: Any) -> dict[str, Any]:
    return {"iss": ISSUER, "aud": AUDIENCE, "exp": clock() + 600, "iat": clock(), "sub": "job 1", **more}


@asynccontextmanager
async def trusting(tmp_path: Path, clock: AuthClock, *issuers: dict[str, Any]) -> AsyncIterator[AuthWorker]:
    """A worker that takes their tokens; there are the user alice and the robot ci."""
    tables = [{"issuer": ISSUER, "audience": AUDIENCE, "account": "ci", **each} for each in issuers]
    tables = [{name: value for name, value in each.items() if value is not None} for each in tables]
    async with auth_worker(tmp_path / "data", clock, {"issuer": tables}) as worker:
        await worker.add_user(ALICE)
        await worker.add_robot()
        yield worker


@pytest.fixture
async def far() -> AsyncIterator[KeySetServer]:
    async with key_set_server() as made:
        yield made


@pytest.fixture
async def worker(
    tmp_path: Path, clock: AuthClock, far: KeySetServer, key: IssuerKey, rsa_key: IssuerKey
) -> AsyncIterator[AuthWorker]:
    far.body = key_set(key.jwk(), rsa_key.jwk())
    async with trusting(tmp_path, clock, {"jwks_url": far.url}) as made:
        yield made


async def refused(worker: AuthWorker, text: str) -> None:
    """As a bearer and as a password, in the same words."""
    for verify in (
        worker.access.credentials.verify_bearer(text, AT_HOME),
        worker.access.credentials.verify_basic(CI, text, AT_HOME),
    ):
        with pytest.raises(Unauthorized) as error:
            await verify
        assert error.value.message == "the credentials are not valid"


async def test_logs_in_as_a_robot(worker: AuthWorker, far: KeySetServer, key: IssuerKey, rsa_key: IssuerKey) -> None:
    """As a bearer, or as the robot's password; keys are fetched with the first token, once, and not at the start."""
    assert far.asked == 0
    for each in (key, rsa_key):
        text = each.sign(claims(worker.clock))
        for proof in (
            await worker.access.credentials.verify_bearer(text, AT_HOME),
            await worker.access.credentials.verify_basic(CI, text, AT_HOME),
        ):
            assert (proof.name, proof.robot, proof.access) == (CI, True, None)
            assert proof.version == worker.accounts.account(CI).version
    assert far.asked == 1
    with pytest.raises(Unauthorized):
        await worker.access.credentials.verify_basic(ALICE, key.sign(claims(worker.clock)), AT_HOME)
    lines = await worker.audited()
    assert [(line.actor, line.outcome) for line in lines] == [("anonymous", "failed"), ("ci", "ok")]


WRONG: dict[str, dict[str, Any]] = {
    "expired": {"exp": -11},
    "not yet": {"nbf": 11},
    "from the future": {"iat": 11},
    "other audience": {"aud": "another"},
    "no audience": {"aud": None},
    "other issuer": {"iss": "https://ci.example.com/"},
    "expiry is text": {"exp": "never"},
    "no expiry": {"exp": None},
}


@pytest.mark.parametrize("name", WRONG)
async def test_wrong_claims(worker: AuthWorker, key: IssuerKey, name: str) -> None:
    """Signed by the issuer, but not for us, or not for now."""
    made = claims(worker.clock)
    value: Any
    for claim, value in WRONG[name].items():
        made[claim] = worker.clock() + value if isinstance(value, int) else value
    await refused(worker, key.sign({claim: value for claim, value in made.items() if value is not None}))
    assert await worker.access.credentials.verify_bearer(key.sign(claims(worker.clock)), AT_HOME)


async def test_wrong_signature(worker: AuthWorker, key: IssuerKey, rsa_key: IssuerKey) -> None:
    """By another key under the same id, by no key, with a header that names the key or its address, or with the public
    key as the secret of an HMAC: refused."""
    made = claims(worker.clock)
    await refused(worker, IssuerKey("one").sign(made))
    await refused(worker, IssuerKey("unknown").sign(made))
    await refused(worker, key.sign(made).rpartition(".")[0] + ".")
    await refused(worker, key.sign(made, crit=["exp"]))
    stranger = IssuerKey("stranger")
    await refused(worker, stranger.sign(made, jwk=stranger.jwk(), jku="http://203.0.113.9/"))
    public = rsa_key.private.public_key()
    forms = (
        (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo),
        (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo),
        (serialization.Encoding.PEM, serialization.PublicFormat.PKCS1),
    )
    for form in forms:
        for algorithm in ("HS256", "none", "RS256"):
            await refused(worker, forged(algorithm, "rsa", made, public.public_bytes(*form)))
    for key_id in (7, None, ["rsa"], "../../dev/null"):
        await refused(worker, forged("RS256", key_id, made, b"x"))
    for nonsense in (7, None, ["RS256"]):
        await refused(worker, forged(nonsense, "rsa", made, b"x"))


def forged(algorithm: object, key_id: object, made: dict[str, Any], secret: bytes) -> str:
    def encode(raw: bytes) -> str:
        return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()

    text = f"{encode(json.dumps({'alg': algorithm, 'kid': key_id}).encode())}.{encode(json.dumps(made).encode())}"
    return f"{text}.{encode(hmac.new(secret, text.encode(), hashlib.sha256).digest())}"


async def test_algorithm_that_is_not_set_up(
    tmp_path: Path, clock: AuthClock, far: KeySetServer, rsa_key: IssuerKey
) -> None:
    """A good signature with an algorithm that is not set up is none, and a key is used with its own algorithm alone."""
    far.body = key_set(rsa_key.jwk(alg="PS256"))
    text = rsa_key.sign(claims(clock))
    async with trusting(tmp_path, clock, {"jwks_url": far.url, "algorithms": ["ES256"]}) as worker:
        await refused(worker, text)
        assert far.asked == 0
    async with trusting(tmp_path / "x", clock, {"jwks_url": far.url}) as worker:
        await refused(worker, text)
        assert far.asked == 1


def test_settings_name_no_shared_secret() -> None:
    """HS256 and `none` cannot be set up; neither can keys over plain http from elsewhere, nor a half of a table."""
    good = {"issuer": ISSUER, "audience": AUDIENCE, "account": "ci", "jwks_url": "https://ci.example.com/keys"}
    assert Issuer.model_validate(good)
    assert Issuer.model_validate({**good, "jwks_url": "http://127.0.0.1:8000/keys"})
    changes: list[dict[str, Any]] = [
        {"algorithms": ["HS256"]},
        {"algorithms": ["none"]},
        {"algorithms": []},
        {"jwks_url": "http://ci.example.com/keys"},
        {"jwks_url": "http://127.0.0.1.example.com/keys"},
        {"jwks_url": "https://user:secret@ci.example.com/keys"},
        {"jwks_url": None},
        {"jwks_file": "keys.json"},
        {"account": None},
        {"account": "No Name"},
        {"account_claim": "sub"},
        {"audience": ""},
    ]
    for change in changes:
        with pytest.raises(ValidationError):
            Issuer.model_validate({**good, **change})


async def test_robot_has_to_be_there(tmp_path: Path, clock: AuthClock, far: KeySetServer, key: IssuerKey) -> None:
    """The robot that a claim names has to be in the store and enabled, and be a robot; nobody becomes a person so."""
    far.body = key_set(key.jwk())
    async with trusting(tmp_path, clock, {"jwks_url": far.url, "account": None, "account_claim": "robot"}) as worker:
        verify = worker.access.credentials.verify_bearer
        text = key.sign(claims(clock, robot="ci"))
        assert (await verify(text, AT_HOME)).name == CI
        for named in ("alice", "nobody", "CI", "anonymous", "../ci", "", 7, None, ["ci"], {"name": "ci"}):
            with pytest.raises(Unauthorized):
                await verify(key.sign(claims(clock, robot=named)), AT_HOME)
        await worker.accounts.set_enabled(CI, False, by=ADMIN)
        with pytest.raises(Unauthorized):  # verified a moment ago
            await verify(text, AT_HOME)


async def test_makes_nothing_that_outlives_it(worker: AuthWorker, key: IssuerKey) -> None:
    """A job that got hold of its CI's token for some minutes can make no API token of the robot's with it."""
    policy = Policy(worker.accounts, worker.access.standing)
    text = key.sign(claims(worker.clock))
    for proof in (
        await worker.access.credentials.verify_bearer(text, AT_HOME),
        await worker.access.credentials.verify_basic(CI, text, AT_HOME),
    ):
        authority = management_rights_of(policy.principal(proof))
        authority.check_may_see(CI)
        with pytest.raises(Denied, match="takes a person's login"):
            authority.check_may_add_credential(CI)


async def test_required_claims_choose(tmp_path: Path, clock: AuthClock, far: KeySetServer, key: IssuerKey) -> None:
    """The first table whose required claims a token has is the one that counts; without any it is nobody's."""
    far.body = key_set(key.jwk())
    deploy = {"jwks_url": far.url, "account": "deploy", "required": {"owner": "team", "ref": ["refs/heads/main", "x"]}}
    build = {"jwks_url": far.url, "required": {"owner": "team", "protected": "true", "run": ["7"]}}
    async with trusting(tmp_path, clock, deploy, build) as worker:
        await worker.add_robot(AccountName("deploy"))
        verify = worker.access.credentials.verify_bearer
        fits = {"owner": "team", "protected": True, "run": 7}
        assert (await verify(key.sign(claims(clock, **fits, ref="refs/heads/main")), AT_HOME)).name == "deploy"
        assert (await verify(key.sign(claims(clock, **fits, ref="refs/heads/other")), AT_HOME)).name == "ci"
        assert (await verify(key.sign(claims(clock, **{**fits, "owner": ["a", "team"]})), AT_HOME)).name == "ci"
        for change in ({"owner": "Team"}, {"owner": "team2"}, {"owner": None}, {"owner": {"team": 1}}, {"run": "77"}):
            with pytest.raises(Unauthorized):
                await verify(key.sign(claims(clock, **{**fits, **change})), AT_HOME)
    assert far.asked == 1  # of one key set


async def test_groups(tmp_path: Path, clock: AuthClock, far: KeySetServer, key: IssuerKey) -> None:
    """The groups of a claim are in the proof, and in the token that it is exchanged for; what no group is called is
    left out."""
    far.body = key_set(key.jwk())
    async with trusting(tmp_path, clock, {"jwks_url": far.url, "groups_claim": "groups"}) as worker:
        text = key.sign(claims(clock, groups=["dev", "Not A Group", "everyone", "ops", 7]))
        proof = await worker.access.credentials.verify_bearer(text, AT_HOME)
        assert proof.groups == ("dev", "ops")
        issued = await worker.access.tokens.issue(proof, {})
        assert (await worker.access.credentials.verify_bearer(issued.text, AT_HOME)).groups == ("dev", "ops")
        for none in (None, {"dev": True}, ""):
            text = key.sign(claims(clock, groups=none))
            assert (await worker.access.credentials.verify_bearer(text, AT_HOME)).groups == ()


async def test_other_settings_end_what_was_proved(
    tmp_path: Path, clock: AuthClock, far: KeySetServer, key: IssuerKey
) -> None:
    """A token of `/token` that was made from an issuer's is worth nothing once that issuer's settings are others."""
    far.body = key_set(key.jwk())
    async with trusting(tmp_path, clock, {"jwks_url": far.url}) as worker:
        proof = await worker.access.credentials.verify_bearer(key.sign(claims(clock)), AT_HOME)
        text = (await worker.access.tokens.issue(proof, {})).text
    again = {"issuer": [{"issuer": ISSUER, "audience": AUDIENCE, "account": "ci", "jwks_url": far.url}]}
    async with auth_worker(tmp_path / "data", clock, again) as worker:
        assert await worker.access.credentials.verify_bearer(text, AT_HOME)
    again["issuer"][0]["required"] = {"owner": "team"}  # type: ignore[assignment]
    async with auth_worker(tmp_path / "data", clock, again) as worker:
        with pytest.raises(Unauthorized):
            await worker.access.credentials.verify_bearer(text, AT_HOME)


async def test_expires_when_remembered(worker: AuthWorker, key: IssuerKey) -> None:
    """A token that was verified before is refused once it has expired."""
    text = key.sign(claims(worker.clock))
    assert await worker.access.credentials.verify_bearer(text, AT_HOME)
    assert await worker.access.credentials.verify_basic(CI, text, AT_HOME)
    worker.clock.now += 611
    await refused(worker, text)


async def test_new_key_is_found(worker: AuthWorker, far: KeySetServer, key: IssuerKey, other_key: IssuerKey) -> None:
    """A token with a key that is new makes the set be fetched again, at most once a minute, whatever keys are named."""
    verify = worker.access.credentials.verify_bearer
    assert await verify(key.sign(claims(worker.clock)), AT_HOME)
    far.body = key_set(other_key.jwk())
    text = other_key.sign(claims(worker.clock))
    for _ in range(3):
        with pytest.raises(Unauthorized):
            await verify(text, AT_HOME)
    assert far.asked == 1
    worker.clock.now += REFRESH_SECONDS
    assert await verify(text, AT_HOME)
    assert far.asked == 2
    await refused(worker, key.sign(claims(worker.clock)))  # withdrawn


async def test_fetching_holds_nobody_up(
    worker: AuthWorker, far: KeySetServer, key: IssuerKey, other_key: IssuerKey
) -> None:
    """While keys are being fetched, tokens whose keys are known go on; those who wait share one request; one who gives
    up does not end it for the others."""
    verify = worker.access.credentials.verify_bearer
    assert await verify(key.sign(claims(worker.clock)), AT_HOME)
    worker.clock.now += REFRESH_SECONDS
    far.body = key_set(key.jwk(), other_key.jwk())
    far.open.clear()
    far.waiting.clear()
    waiting = [asyncio.create_task(verify(other_key.sign(claims(worker.clock, n=n)), AT_HOME)) for n in range(5)]
    await far.waiting.wait()
    assert await verify(key.sign(claims(worker.clock, n=6)), AT_HOME)
    waiting[0].cancel()
    await asyncio.gather(waiting[0], return_exceptions=True)
    assert not any(task.done() for task in waiting[1:])
    far.open.set()
    assert {proof.name for proof in await asyncio.gather(*waiting[1:])} == {CI}
    assert far.asked == 2


BROKEN: dict[str, dict[str, Any]] = {
    "an error": {"status": 500},
    "elsewhere": {"status": 302, "extra": "location: http://127.0.0.1:1/\r\n"},
    "no JSON": {"body": b"<html>"},
    "no set": {"body": b'{"keys": 7}'},
    "a list": {"body": b"[]"},
    "too large": {"body": b"x" * (identity_http.LARGEST_ANSWER + 1)},
    "no keys": {"body": key_set()},
    "nonsense": {"body": b'{"keys": [7, null, {}, {"kty": "EC"}, {"kty": "RSA", "n": "!", "e": 1}, {"kty": "x"}]}'},
}


@pytest.mark.parametrize("name", BROKEN)
async def test_keys_cannot_be_had(worker: AuthWorker, far: KeySetServer, key: IssuerKey, name: str) -> None:
    """Then nobody gets in; another try is made after some seconds, and when it succeeds, they do."""
    good = far.body
    for field, value in BROKEN[name].items():
        setattr(far, field, value)
    text = key.sign(claims(worker.clock))
    await refused(worker, text)
    assert far.asked == 1
    far.body, far.status, far.extra = good, 200, ""
    worker.clock.now += REFRESH_SECONDS if name in ("no keys", "nonsense") else RETRY_SECONDS
    assert await worker.access.credentials.verify_bearer(text, AT_HOME)


async def test_keys_stay_good_while_the_issuer_is_away(worker: AuthWorker, far: KeySetServer, key: IssuerKey) -> None:
    """Known keys are asked for again after an hour, beside the request; when that fails they count for a day."""
    verify = worker.access.credentials.verify_bearer
    assert await verify(key.sign(claims(worker.clock)), AT_HOME)
    far.status = 503
    far.waiting.clear()
    worker.clock.now += FRESH_SECONDS + 1
    assert await verify(key.sign(claims(worker.clock)), AT_HOME)
    await far.waiting.wait()
    worker.clock.now += STALE_SECONDS
    await refused(worker, key.sign(claims(worker.clock)))


async def test_keys_in_a_file(tmp_path: Path, clock: AuthClock, key: IssuerKey, other_key: IssuerKey) -> None:
    """A file is read when it is needed, and again when it has changed; private and symmetric keys in it are no keys."""
    file = tmp_path / "keys.json"
    async with trusting(tmp_path, clock, {"jwks_file": str(file)}) as worker:
        text = key.sign(claims(clock))
        await refused(worker, text)
        file.write_bytes(key_set(key.jwk(d="AAAA")))
        await refused(worker, text)
        file.write_bytes(key_set(key.jwk(use="enc"), {"kty": "oct", "k": "AAAA", "kid": "one"}))
        await refused(worker, text)
        file.write_bytes(key_set(key.jwk(), other_key.jwk()))
        assert await worker.access.credentials.verify_bearer(text, AT_HOME)
        assert await worker.access.credentials.verify_bearer(other_key.sign(claims(clock)), AT_HOME)


async def test_token_without_a_key_id(tmp_path: Path, clock: AuthClock, key: IssuerKey, other_key: IssuerKey) -> None:
    """Where one key alone fits, it need not be named; where several do, it has to be."""
    file = tmp_path / "keys.json"
    file.write_bytes(key_set(key.jwk()))
    async with trusting(tmp_path, clock, {"jwks_file": str(file)}) as worker:
        text = key.sign(claims(clock), kid=None)
        assert await worker.access.credentials.verify_bearer(text, AT_HOME)
        file.write_bytes(key_set(key.jwk(), other_key.jwk()))
        with pytest.raises(Unauthorized):
            await worker.access.credentials.verify_bearer(key.sign(claims(clock, n=1), kid=None), AT_HOME)


def test_short_rsa_keys_are_left_out() -> None:
    """A key that can be factored is none."""
    assert not jwks.parse_key_set(key_set(IssuerKey("short", "RS256", 1024).jwk()))
    assert len(jwks.parse_key_set(key_set(IssuerKey("long", "RS256").jwk()))) == 1
