"""Tokens of trusted issuers: which are accepted, for which account, and how their keys are fetched."""

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
from joserfc.jwk import OKPKey
from pydantic import ValidationError

from registry.auth.external import identity_http, jwks
from registry.auth.external.jwks import FRESH_SECONDS, REFRESH_SECONDS, RETRY_SECONDS, STALE_SECONDS
from registry.auth.rights.management_rights import management_rights_of
from registry.auth.rights.policy import Policy
from registry.config.auth_settings import Issuer
from storage.access import AccountName
from storage.errors import Denied, Unauthorized
from tests.fakes.auth_worker import ADMIN, ALICE, AT_HOME, CI, AuthClock, AuthWorker, auth_worker
from tests.fakes.token_issuer import AUDIENCE, ISSUER, IssuerKey, KeySetServer, key_set, key_set_server, signed_token


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
    """Yields a worker that trusts these issuers. Its store has the user alice and the robot ci."""
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
    """Checks that a token is refused as a bearer token and as a password, with the usual text."""
    for verify in (
        worker.access.credential_verifier.verify_bearer(text, AT_HOME),
        worker.access.credential_verifier.verify_basic(CI, text, AT_HOME),
    ):
        with pytest.raises(Unauthorized) as error:
            await verify
        assert error.value.message == "the credentials are not valid"


async def test_logs_in_as_a_robot(worker: AuthWorker, far: KeySetServer, key: IssuerKey, rsa_key: IssuerKey) -> None:
    """A token logs in as a bearer token or as the robot's password. Keys are fetched once, with the first token and not
    at the start."""
    assert far.asked == 0
    for each in (key, rsa_key):
        text = each.sign(claims(worker.clock))
        for proof in (
            await worker.access.credential_verifier.verify_bearer(text, AT_HOME),
            await worker.access.credential_verifier.verify_basic(CI, text, AT_HOME),
        ):
            assert (proof.name, proof.robot, proof.access) == (CI, True, None)
            assert proof.version == worker.accounts.account(CI).version
    assert far.asked == 1
    with pytest.raises(Unauthorized):
        await worker.access.credential_verifier.verify_basic(ALICE, key.sign(claims(worker.clock)), AT_HOME)
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
    """A token that the issuer signed for another service or another time is refused."""
    made = claims(worker.clock)
    value: Any
    for claim, value in WRONG[name].items():
        made[claim] = worker.clock() + value if isinstance(value, int) else value
    await refused(worker, key.sign({claim: value for claim, value in made.items() if value is not None}))
    assert await worker.access.credential_verifier.verify_bearer(key.sign(claims(worker.clock)), AT_HOME)


async def test_wrong_signature(worker: AuthWorker, key: IssuerKey, rsa_key: IssuerKey) -> None:
    """A token is refused if another key with the same id signed it, if no key signed it, if its header holds the key or
    the key's URL, or if it is signed with HMAC and the public key as the secret."""
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
    """An algorithm that the settings do not allow is refused. A key is accepted only with the algorithm that the key
    states."""
    far.body = key_set(rsa_key.jwk(alg="PS256"))
    text = rsa_key.sign(claims(clock))
    async with trusting(tmp_path, clock, {"jwks_url": far.url, "algorithms": ["ES256"]}) as worker:
        await refused(worker, text)
        assert far.asked == 0
    async with trusting(tmp_path / "x", clock, {"jwks_url": far.url}) as worker:
        await refused(worker, text)
        assert far.asked == 1


def test_settings_name_no_shared_secret() -> None:
    """The settings refuse HS256 and `none`, keys over plain http from another machine, and incomplete tables."""
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
    """The claim has to name an enabled robot of the store. No token logs in as a person."""
    far.body = key_set(key.jwk())
    async with trusting(tmp_path, clock, {"jwks_url": far.url, "account": None, "account_claim": "robot"}) as worker:
        verify = worker.access.credential_verifier.verify_bearer
        text = key.sign(claims(clock, robot="ci"))
        assert (await verify(text, AT_HOME)).name == CI
        for named in ("alice", "nobody", "CI", "anonymous", "../ci", "", 7, None, ["ci"], {"name": "ci"}):
            with pytest.raises(Unauthorized):
                await verify(key.sign(claims(clock, robot=named)), AT_HOME)
        await worker.accounts.set_enabled(CI, False, by=ADMIN)
        with pytest.raises(Unauthorized):  # verified a moment ago
            await verify(text, AT_HOME)


async def test_makes_nothing_that_outlives_it(worker: AuthWorker, key: IssuerKey) -> None:
    """An issuer's token cannot make an API token of its robot."""
    policy = Policy(worker.accounts, worker.access.revocation_check)
    text = key.sign(claims(worker.clock))
    for proof in (
        await worker.access.credential_verifier.verify_bearer(text, AT_HOME),
        await worker.access.credential_verifier.verify_basic(CI, text, AT_HOME),
    ):
        authority = management_rights_of(policy.principal(proof))
        authority.check_may_see(CI)
        with pytest.raises(Denied, match="log in as a person"):
            authority.check_may_change_credentials(CI)


async def test_required_claims_choose(tmp_path: Path, clock: AuthClock, far: KeySetServer, key: IssuerKey) -> None:
    """The first table whose required claims a token has is used. Without such a table, the token is refused."""
    far.body = key_set(key.jwk())
    deploy = {"jwks_url": far.url, "account": "deploy", "required": {"owner": "team", "ref": ["refs/heads/main", "x"]}}
    build = {"jwks_url": far.url, "required": {"owner": "team", "protected": "true", "run": ["7"]}}
    async with trusting(tmp_path, clock, deploy, build) as worker:
        await worker.add_robot(AccountName("deploy"))
        verify = worker.access.credential_verifier.verify_bearer
        fits = {"owner": "team", "protected": True, "run": 7}
        assert (await verify(key.sign(claims(clock, **fits, ref="refs/heads/main")), AT_HOME)).name == "deploy"
        assert (await verify(key.sign(claims(clock, **fits, ref="refs/heads/other")), AT_HOME)).name == "ci"
        assert (await verify(key.sign(claims(clock, **{**fits, "owner": ["a", "team"]})), AT_HOME)).name == "ci"
        for change in ({"owner": "Team"}, {"owner": "team2"}, {"owner": None}, {"owner": {"team": 1}}, {"run": "77"}):
            with pytest.raises(Unauthorized):
                await verify(key.sign(claims(clock, **{**fits, **change})), AT_HOME)
    assert far.asked == 1  # of one key set


async def test_groups(tmp_path: Path, clock: AuthClock, far: KeySetServer, key: IssuerKey) -> None:
    """The groups of a claim are in the identity and in the bearer token made with it. Invalid group names are
    ignored."""
    far.body = key_set(key.jwk())
    async with trusting(tmp_path, clock, {"jwks_url": far.url, "groups_claim": "groups"}) as worker:
        text = key.sign(claims(clock, groups=["dev", "Not A Group", "everyone", "ops", 7]))
        proof = await worker.access.credential_verifier.verify_bearer(text, AT_HOME)
        assert proof.groups == ("dev", "ops")
        issued = await worker.access.bearer_tokens.issue(proof, {})
        assert (await worker.access.credential_verifier.verify_bearer(issued.text, AT_HOME)).groups == ("dev", "ops")
        for none in (None, {"dev": True}, ""):
            text = key.sign(claims(clock, groups=none))
            assert (await worker.access.credential_verifier.verify_bearer(text, AT_HOME)).groups == ()


async def test_other_settings_end_what_was_proved(
    tmp_path: Path, clock: AuthClock, far: KeySetServer, key: IssuerKey
) -> None:
    """When the settings of an issuer change, bearer tokens made with that issuer's tokens are refused."""
    far.body = key_set(key.jwk())
    async with trusting(tmp_path, clock, {"jwks_url": far.url}) as worker:
        proof = await worker.access.credential_verifier.verify_bearer(key.sign(claims(clock)), AT_HOME)
        text = (await worker.access.bearer_tokens.issue(proof, {})).text
    again = {"issuer": [{"issuer": ISSUER, "audience": AUDIENCE, "account": "ci", "jwks_url": far.url}]}
    async with auth_worker(tmp_path / "data", clock, again) as worker:
        assert await worker.access.credential_verifier.verify_bearer(text, AT_HOME)
    again["issuer"][0]["required"] = {"owner": "team"}  # type: ignore[assignment]
    async with auth_worker(tmp_path / "data", clock, again) as worker:
        with pytest.raises(Unauthorized):
            await worker.access.credential_verifier.verify_bearer(text, AT_HOME)


async def test_expires_when_remembered(worker: AuthWorker, key: IssuerKey) -> None:
    """A cached token is refused once it has expired."""
    text = key.sign(claims(worker.clock))
    assert await worker.access.credential_verifier.verify_bearer(text, AT_HOME)
    assert await worker.access.credential_verifier.verify_basic(CI, text, AT_HOME)
    worker.clock.now += 611
    await refused(worker, text)


async def test_new_key_is_found(worker: AuthWorker, far: KeySetServer, key: IssuerKey, other_key: IssuerKey) -> None:
    """An unknown key id makes the registry fetch the key set again, at most once a minute."""
    verify = worker.access.credential_verifier.verify_bearer
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
    """During a fetch of keys, tokens with known keys are checked without a wait. All other tokens wait for one shared
    request, which continues if one of the waiting callers is cancelled."""
    verify = worker.access.credential_verifier.verify_bearer
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
    "too large": {"body": b"x" * (identity_http.MAX_RESPONSE_BYTES + 1)},
    "no keys": {"body": key_set()},
    "nonsense": {"body": b'{"keys": [7, null, {}, {"kty": "EC"}, {"kty": "RSA", "n": "!", "e": 1}, {"kty": "x"}]}'},
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.slow
async def test_keys_cannot_be_had(worker: AuthWorker, far: KeySetServer, key: IssuerKey, name: str) -> None:
    """Without keys every token is refused. The fetch is repeated after some seconds, and then tokens are accepted."""
    good = far.body
    for field, value in BROKEN[name].items():
        setattr(far, field, value)
    text = key.sign(claims(worker.clock))
    await refused(worker, text)
    assert far.asked == 1
    far.body, far.status, far.extra = good, 200, ""
    worker.clock.now += REFRESH_SECONDS if name in ("no keys", "nonsense") else RETRY_SECONDS
    assert await worker.access.credential_verifier.verify_bearer(text, AT_HOME)


async def test_keys_stay_good_while_the_issuer_is_away(worker: AuthWorker, far: KeySetServer, key: IssuerKey) -> None:
    """Known keys are fetched again after an hour, in the background. If that fails, the known keys are used for a
    day."""
    verify = worker.access.credential_verifier.verify_bearer
    assert await verify(key.sign(claims(worker.clock)), AT_HOME)
    far.status = 503
    far.waiting.clear()
    worker.clock.now += FRESH_SECONDS + 1
    assert await verify(key.sign(claims(worker.clock)), AT_HOME)
    await far.waiting.wait()
    worker.clock.now += STALE_SECONDS
    await refused(worker, key.sign(claims(worker.clock)))


async def test_keys_in_a_file(tmp_path: Path, clock: AuthClock, key: IssuerKey, other_key: IssuerKey) -> None:
    """A key file is read when it is needed, and again when it has changed. Private and symmetric keys are ignored."""
    file = tmp_path / "keys.json"
    async with trusting(tmp_path, clock, {"jwks_file": str(file)}) as worker:
        text = key.sign(claims(clock))
        await refused(worker, text)
        file.write_bytes(key_set(key.jwk(d="AAAA")))
        await refused(worker, text)
        file.write_bytes(key_set(key.jwk(use="enc"), {"kty": "oct", "k": "AAAA", "kid": "one"}))
        await refused(worker, text)
        file.write_bytes(key_set(key.jwk(), other_key.jwk()))
        assert await worker.access.credential_verifier.verify_bearer(text, AT_HOME)
        assert await worker.access.credential_verifier.verify_bearer(other_key.sign(claims(clock)), AT_HOME)


async def test_token_without_a_key_id(tmp_path: Path, clock: AuthClock, key: IssuerKey, other_key: IssuerKey) -> None:
    """A token may omit the key id if exactly one key fits."""
    file = tmp_path / "keys.json"
    file.write_bytes(key_set(key.jwk()))
    async with trusting(tmp_path, clock, {"jwks_file": str(file)}) as worker:
        text = key.sign(claims(clock), kid=None)
        assert await worker.access.credential_verifier.verify_bearer(text, AT_HOME)
        file.write_bytes(key_set(key.jwk(), other_key.jwk()))
        with pytest.raises(Unauthorized):
            await worker.access.credential_verifier.verify_bearer(key.sign(claims(clock, n=1), kid=None), AT_HOME)


async def test_eddsa_and_a_long_header(tmp_path: Path, clock: AuthClock) -> None:
    """A token signed with EdDSA is accepted if the settings allow EdDSA, even if its header has a certificate. A key
    for key agreement is ignored."""
    signing, other = OKPKey.generate_key("Ed25519"), OKPKey.generate_key("X25519")
    file = tmp_path / "keys.json"
    file.write_bytes(key_set(dict(other.as_dict()), dict(signing.as_dict())))
    async with trusting(tmp_path, clock, {"jwks_file": str(file), "algorithms": ["EdDSA"]}) as worker:
        text = signed_token({"alg": "EdDSA", "x5c": ["A" * 4000]}, claims(clock), signing)
        assert (await worker.access.credential_verifier.verify_bearer(text, AT_HOME)).name == CI
        await refused(worker, signed_token({"alg": "EdDSA"}, claims(clock), OKPKey.generate_key("Ed25519")))


async def test_an_expiry_that_is_no_float(worker: AuthWorker, key: IssuerKey) -> None:
    """A number that is too large for a time is refused, and causes no failure."""
    await refused(worker, key.sign({**claims(worker.clock), "exp": 10**400}))


def test_short_rsa_keys_are_left_out() -> None:
    """An RSA key that is short enough to be factored is ignored."""
    assert not jwks.parse_key_set(key_set(IssuerKey("short", "RS256", 1024).jwk()))
    assert len(jwks.parse_key_set(key_set(IssuerKey("long", "RS256").jwk()))) == 1
