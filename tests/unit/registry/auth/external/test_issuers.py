"""Tokens of trusted issuers, such as CI systems. The tests check which tokens are accepted, for which account, and how
the issuer's keys are fetched."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import os
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
from tests.fakes.auth_worker import ADMIN, ALICE, CI, KNOWN_ADDRESS, AuthClock, AuthWorker, auth_worker
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


def claims(clock: AuthClock, **changes: Any) -> dict[str, Any]:
    return {"iss": ISSUER, "aud": AUDIENCE, "exp": clock() + 600, "iat": clock(), "sub": "job 1", **changes}


@asynccontextmanager
async def worker_that_trusts(tmp_path: Path, clock: AuthClock, *issuers: dict[str, Any]) -> AsyncIterator[AuthWorker]:
    """Yields a worker whose settings trust these issuers. Its store has the user alice and the robot account ci."""
    tables = [{"issuer": ISSUER, "audience": AUDIENCE, "account": "ci", **each} for each in issuers]
    tables = [{name: value for name, value in each.items() if value is not None} for each in tables]
    async with auth_worker(tmp_path / "data", clock, {"issuer": tables}) as worker:
        await worker.add_user(ALICE)
        await worker.add_robot()
        yield worker


@pytest.fixture
async def key_server() -> AsyncIterator[KeySetServer]:
    """Yields an HTTP server with the issuer's key set."""
    async with key_set_server() as server:
        yield server


@pytest.fixture
async def worker(
    tmp_path: Path, clock: AuthClock, key_server: KeySetServer, key: IssuerKey, rsa_key: IssuerKey
) -> AsyncIterator[AuthWorker]:
    key_server.body = key_set(key.jwk(), rsa_key.jwk())
    async with worker_that_trusts(tmp_path, clock, {"jwks_url": key_server.url}) as started:
        yield started


async def check_refused(worker: AuthWorker, text: str) -> None:
    """Checks that a token is refused as a bearer token and as a password, with the usual error text."""
    for verify in (
        worker.access.credential_verifier.verify_bearer(text, KNOWN_ADDRESS),
        worker.access.credential_verifier.verify_basic(CI, text, KNOWN_ADDRESS),
    ):
        with pytest.raises(Unauthorized) as error:
            await verify
        assert error.value.message == "the credentials are not valid"


async def test_a_token_logs_in_as_a_robot(
    worker: AuthWorker, key_server: KeySetServer, key: IssuerKey, rsa_key: IssuerKey
) -> None:
    """An issuer's token logs in as a bearer token, and as the robot's password. The keys are fetched once, at the first
    token and not when the server starts."""
    assert key_server.request_count == 0
    for each in (key, rsa_key):
        text = each.sign(claims(worker.clock))
        for proof in (
            await worker.access.credential_verifier.verify_bearer(text, KNOWN_ADDRESS),
            await worker.access.credential_verifier.verify_basic(CI, text, KNOWN_ADDRESS),
        ):
            assert (proof.name, proof.robot, proof.access) == (CI, True, None)
            assert proof.version == worker.accounts.account(CI).version
    assert key_server.request_count == 1
    with pytest.raises(Unauthorized):
        await worker.access.credential_verifier.verify_basic(ALICE, key.sign(claims(worker.clock)), KNOWN_ADDRESS)
    lines = await worker.audited()
    assert [(line.actor, line.outcome) for line in lines] == [("anonymous", "failed"), ("ci", "ok")]


WRONG_CLAIMS: dict[str, dict[str, Any]] = {
    "expired": {"exp": -11},
    "not yet": {"nbf": 11},
    "from the future": {"iat": 11},
    "other audience": {"aud": "another"},
    "no audience": {"aud": None},
    "other issuer": {"iss": "https://ci.example.com/"},
    "expiry is text": {"exp": "never"},
    "no expiry": {"exp": None},
}
"""Changes to the claims. A number is an offset to the current time in seconds, and None removes the claim."""


@pytest.mark.parametrize("name", WRONG_CLAIMS)
async def test_a_token_with_wrong_claims_is_refused(worker: AuthWorker, key: IssuerKey, name: str) -> None:
    """A token that the issuer signed for another service or another time is refused."""
    token_claims = claims(worker.clock)
    value: Any
    for claim, value in WRONG_CLAIMS[name].items():
        token_claims[claim] = worker.clock() + value if isinstance(value, int) else value
    await check_refused(worker, key.sign({claim: value for claim, value in token_claims.items() if value is not None}))
    assert await worker.access.credential_verifier.verify_bearer(key.sign(claims(worker.clock)), KNOWN_ADDRESS)


async def test_a_token_with_a_wrong_signature_is_refused(
    worker: AuthWorker, key: IssuerKey, rsa_key: IssuerKey
) -> None:
    """A token is refused if another key with the same id signed it, if its key id is unknown, if it has no signature,
    or if its header has a key or a key's URL. It is also refused if it is signed with HMAC and the public key as the
    secret."""
    token_claims = claims(worker.clock)
    await check_refused(worker, IssuerKey("one").sign(token_claims))
    await check_refused(worker, IssuerKey("unknown").sign(token_claims))
    await check_refused(worker, key.sign(token_claims).rpartition(".")[0] + ".")
    await check_refused(worker, key.sign(token_claims, crit=["exp"]))
    stranger = IssuerKey("stranger")
    await check_refused(worker, stranger.sign(token_claims, jwk=stranger.jwk(), jku="http://203.0.113.9/"))
    public = rsa_key.private.public_key()
    forms = (
        (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo),
        (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo),
        (serialization.Encoding.PEM, serialization.PublicFormat.PKCS1),
    )
    for form in forms:
        for algorithm in ("HS256", "none", "RS256"):
            await check_refused(worker, forged(algorithm, "rsa", token_claims, public.public_bytes(*form)))
    for key_id in (7, None, ["rsa"], "../../dev/null"):
        await check_refused(worker, forged("RS256", key_id, token_claims, b"x"))
    for nonsense in (7, None, ["RS256"]):
        await check_refused(worker, forged(nonsense, "rsa", token_claims, b"x"))


def forged(algorithm: object, key_id: object, token_claims: dict[str, Any], secret: bytes) -> str:
    """Returns a token that is signed with HMAC and `secret`, whatever algorithm its header names."""

    def encode(raw: bytes) -> str:
        return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()

    text = (
        f"{encode(json.dumps({'alg': algorithm, 'kid': key_id}).encode())}.{encode(json.dumps(token_claims).encode())}"
    )
    return f"{text}.{encode(hmac.new(secret, text.encode(), hashlib.sha256).digest())}"


async def test_an_algorithm_that_is_not_allowed_is_refused(
    tmp_path: Path, clock: AuthClock, key_server: KeySetServer, rsa_key: IssuerKey
) -> None:
    """An algorithm that the settings do not allow is refused. If a key names an algorithm, a token with this key must
    use this algorithm."""
    key_server.body = key_set(rsa_key.jwk(alg="PS256"))
    text = rsa_key.sign(claims(clock))
    async with worker_that_trusts(tmp_path, clock, {"jwks_url": key_server.url, "algorithms": ["ES256"]}) as worker:
        await check_refused(worker, text)
        assert key_server.request_count == 0
    async with worker_that_trusts(tmp_path / "x", clock, {"jwks_url": key_server.url}) as worker:
        await check_refused(worker, text)
        assert key_server.request_count == 1


def test_settings_refuse_unsafe_values() -> None:
    """The settings refuse HS256 and `none`, URLs of keys over plain http at another machine, and incomplete tables."""
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


async def test_the_claim_has_to_name_an_enabled_robot(
    tmp_path: Path, clock: AuthClock, key_server: KeySetServer, key: IssuerKey
) -> None:
    """The claim has to name a robot account of the store that is enabled. An issuer's token cannot log in as a
    person."""
    key_server.body = key_set(key.jwk())
    async with worker_that_trusts(
        tmp_path, clock, {"jwks_url": key_server.url, "account": None, "account_claim": "robot"}
    ) as worker:
        verify = worker.access.credential_verifier.verify_bearer
        text = key.sign(claims(clock, robot="ci"))
        assert (await verify(text, KNOWN_ADDRESS)).name == CI
        for named in ("alice", "nobody", "CI", "anonymous", "../ci", "", 7, None, ["ci"], {"name": "ci"}):
            with pytest.raises(Unauthorized):
                await verify(key.sign(claims(clock, robot=named)), KNOWN_ADDRESS)
        await worker.accounts.set_enabled(CI, False, by=ADMIN)
        with pytest.raises(Unauthorized):  # although the same token was accepted above
            await verify(text, KNOWN_ADDRESS)


async def test_an_issuers_token_cannot_make_an_api_token(worker: AuthWorker, key: IssuerKey) -> None:
    """A client with an issuer's token cannot make an API token for the robot, because the API token would be valid for
    longer."""
    policy = Policy(worker.accounts, worker.access.revocation_check)
    text = key.sign(claims(worker.clock))
    for proof in (
        await worker.access.credential_verifier.verify_bearer(text, KNOWN_ADDRESS),
        await worker.access.credential_verifier.verify_basic(CI, text, KNOWN_ADDRESS),
    ):
        authority = management_rights_of(policy.principal(proof))
        authority.check_may_see(CI)
        with pytest.raises(Denied, match="only a person may do this"):
            authority.check_may_change_credentials(CI)


async def test_required_claims_select_the_table(
    tmp_path: Path, clock: AuthClock, key_server: KeySetServer, key: IssuerKey
) -> None:
    """The first issuer table in the settings whose required claims the token has is used. If there is none, the token
    is refused."""
    key_server.body = key_set(key.jwk())
    deploy = {
        "jwks_url": key_server.url,
        "account": "deploy",
        "required": {"owner": "team", "ref": ["refs/heads/main", "x"]},
    }
    build = {"jwks_url": key_server.url, "required": {"owner": "team", "protected": "true", "run": ["7"]}}
    async with worker_that_trusts(tmp_path, clock, deploy, build) as worker:
        await worker.add_robot(AccountName("deploy"))
        verify = worker.access.credential_verifier.verify_bearer
        fits = {"owner": "team", "protected": True, "run": 7}
        assert (await verify(key.sign(claims(clock, **fits, ref="refs/heads/main")), KNOWN_ADDRESS)).name == "deploy"
        assert (await verify(key.sign(claims(clock, **fits, ref="refs/heads/other")), KNOWN_ADDRESS)).name == "ci"
        assert (await verify(key.sign(claims(clock, **{**fits, "owner": ["a", "team"]})), KNOWN_ADDRESS)).name == "ci"
        for change in ({"owner": "Team"}, {"owner": "team2"}, {"owner": None}, {"owner": {"team": 1}}, {"run": "77"}):
            with pytest.raises(Unauthorized):
                await verify(key.sign(claims(clock, **{**fits, **change})), KNOWN_ADDRESS)
    assert key_server.request_count == 1  # both tables share one key set


async def test_groups_of_a_token(tmp_path: Path, clock: AuthClock, key_server: KeySetServer, key: IssuerKey) -> None:
    """The identity has the groups in the token's claim, and so has a bearer token that is issued for it. Invalid group
    names are ignored."""
    key_server.body = key_set(key.jwk())
    async with worker_that_trusts(tmp_path, clock, {"jwks_url": key_server.url, "groups_claim": "groups"}) as worker:
        text = key.sign(claims(clock, groups=["dev", "Not A Group", "everyone", "ops", 7]))
        proof = await worker.access.credential_verifier.verify_bearer(text, KNOWN_ADDRESS)
        assert proof.groups == ("dev", "ops")
        issued = await worker.access.bearer_tokens.issue(proof, {})
        assert (await worker.access.credential_verifier.verify_bearer(issued.text, KNOWN_ADDRESS)).groups == (
            "dev",
            "ops",
        )
        for none in (None, {"dev": True}, ""):
            text = key.sign(claims(clock, groups=none))
            assert (await worker.access.credential_verifier.verify_bearer(text, KNOWN_ADDRESS)).groups == ()


async def test_changed_settings_make_bearer_tokens_invalid(
    tmp_path: Path, clock: AuthClock, key_server: KeySetServer, key: IssuerKey
) -> None:
    """When the settings of an issuer change, bearer tokens that were issued for that issuer's tokens are refused."""
    key_server.body = key_set(key.jwk())
    async with worker_that_trusts(tmp_path, clock, {"jwks_url": key_server.url}) as worker:
        proof = await worker.access.credential_verifier.verify_bearer(key.sign(claims(clock)), KNOWN_ADDRESS)
        text = (await worker.access.bearer_tokens.issue(proof, {})).text
    new_settings = {"issuer": [{"issuer": ISSUER, "audience": AUDIENCE, "account": "ci", "jwks_url": key_server.url}]}
    async with auth_worker(tmp_path / "data", clock, new_settings) as worker:
        assert await worker.access.credential_verifier.verify_bearer(text, KNOWN_ADDRESS)
    new_settings["issuer"][0]["required"] = {"owner": "team"}  # type: ignore[assignment]
    async with auth_worker(tmp_path / "data", clock, new_settings) as worker:
        with pytest.raises(Unauthorized):
            await worker.access.credential_verifier.verify_bearer(text, KNOWN_ADDRESS)


async def test_a_cached_token_expires(worker: AuthWorker, key: IssuerKey) -> None:
    """A cached token is refused once it has expired."""
    text = key.sign(claims(worker.clock))
    assert await worker.access.credential_verifier.verify_bearer(text, KNOWN_ADDRESS)
    assert await worker.access.credential_verifier.verify_basic(CI, text, KNOWN_ADDRESS)
    worker.clock.now += 611
    await check_refused(worker, text)


async def test_a_new_key_is_fetched(
    worker: AuthWorker, key_server: KeySetServer, key: IssuerKey, other_key: IssuerKey
) -> None:
    """An unknown key id makes the registry fetch the key set again, at most once a minute."""
    verify = worker.access.credential_verifier.verify_bearer
    assert await verify(key.sign(claims(worker.clock)), KNOWN_ADDRESS)
    key_server.body = key_set(other_key.jwk())
    text = other_key.sign(claims(worker.clock))
    for _ in range(3):
        with pytest.raises(Unauthorized):
            await verify(text, KNOWN_ADDRESS)
    assert key_server.request_count == 1
    worker.clock.now += REFRESH_SECONDS
    assert await verify(text, KNOWN_ADDRESS)
    assert key_server.request_count == 2
    await check_refused(worker, key.sign(claims(worker.clock)))  # its key is no longer in the key set


@pytest.mark.parametrize("key_id", ["one", None])
async def test_a_key_that_replaces_another_under_its_id_is_fetched(
    worker: AuthWorker, key_server: KeySetServer, key: IssuerKey, key_id: str | None
) -> None:
    """If an issuer replaces its key by one with the same id, or its tokens name no key, a wrong signature makes the
    registry fetch the key set again, at most once a minute. Then the new key is accepted, and the old one is not."""
    verify, new_key = worker.access.credential_verifier.verify_bearer, IssuerKey("one")
    assert await verify(key.sign(claims(worker.clock), kid=key_id), KNOWN_ADDRESS)
    key_server.body = key_set(new_key.jwk())
    text = new_key.sign(claims(worker.clock), kid=key_id)
    for _ in range(3):
        with pytest.raises(Unauthorized):
            await verify(text, KNOWN_ADDRESS)
    assert key_server.request_count == 1
    worker.clock.now += REFRESH_SECONDS
    assert await verify(text, KNOWN_ADDRESS)
    assert key_server.request_count == 2
    await check_refused(worker, key.sign(claims(worker.clock), kid=key_id))


async def test_known_keys_are_used_during_a_fetch(
    worker: AuthWorker, key_server: KeySetServer, key: IssuerKey, other_key: IssuerKey
) -> None:
    """During a fetch of keys, tokens with known keys are checked without a wait. All other tokens wait for one shared
    fetch. It continues if one of the waiting callers is cancelled."""
    verify = worker.access.credential_verifier.verify_bearer
    assert await verify(key.sign(claims(worker.clock)), KNOWN_ADDRESS)
    worker.clock.now += REFRESH_SECONDS
    key_server.body = key_set(key.jwk(), other_key.jwk())
    key_server.open.clear()
    key_server.waiting.clear()
    waiting = [asyncio.create_task(verify(other_key.sign(claims(worker.clock, n=n)), KNOWN_ADDRESS)) for n in range(5)]
    await key_server.waiting.wait()
    assert await verify(key.sign(claims(worker.clock, n=6)), KNOWN_ADDRESS)
    waiting[0].cancel()
    await asyncio.gather(waiting[0], return_exceptions=True)
    assert not any(task.done() for task in waiting[1:])
    key_server.open.set()
    assert {proof.name for proof in await asyncio.gather(*waiting[1:])} == {CI}
    assert key_server.request_count == 2


KEY_SERVER_FAULTS: dict[str, dict[str, Any]] = {
    "an error": {"status": 500},
    "elsewhere": {"status": 302, "extra": "location: http://127.0.0.1:1/\r\n"},
    "no JSON": {"body": b"<html>"},
    "no set": {"body": b'{"keys": 7}'},
    "a list": {"body": b"[]"},
    "too large": {"body": b"x" * (identity_http.MAX_RESPONSE_BYTES + 1)},
    "no keys": {"body": key_set()},
    "nonsense": {"body": b'{"keys": [7, null, {}, {"kty": "EC"}, {"kty": "RSA", "n": "!", "e": 1}, {"kty": "x"}]}'},
}
"""For each fault, the attributes of the key server that produce the fault."""


@pytest.mark.parametrize("name", KEY_SERVER_FAULTS)
@pytest.mark.slow
async def test_tokens_are_refused_while_keys_cannot_be_fetched(
    worker: AuthWorker, key_server: KeySetServer, key: IssuerKey, name: str
) -> None:
    """Without keys, every token is refused. The fetch is repeated after a pause, and then tokens are accepted."""
    good = key_server.body
    for field, value in KEY_SERVER_FAULTS[name].items():
        setattr(key_server, field, value)
    text = key.sign(claims(worker.clock))
    await check_refused(worker, text)
    assert key_server.request_count == 1
    key_server.body, key_server.status, key_server.extra = good, 200, ""
    worker.clock.now += REFRESH_SECONDS if name in ("no keys", "nonsense") else RETRY_SECONDS
    assert await worker.access.credential_verifier.verify_bearer(text, KNOWN_ADDRESS)


async def test_known_keys_are_used_while_the_issuer_is_unavailable(
    worker: AuthWorker, key_server: KeySetServer, key: IssuerKey
) -> None:
    """Known keys are fetched again after an hour, in the background. If the fetch fails, the known keys are used for up
    to a day."""
    verify = worker.access.credential_verifier.verify_bearer
    assert await verify(key.sign(claims(worker.clock)), KNOWN_ADDRESS)
    key_server.status = 503
    key_server.waiting.clear()
    worker.clock.now += FRESH_SECONDS + 1
    assert await verify(key.sign(claims(worker.clock)), KNOWN_ADDRESS)
    await key_server.waiting.wait()
    worker.clock.now += STALE_SECONDS
    await check_refused(worker, key.sign(claims(worker.clock)))


async def test_keys_are_read_from_a_file(
    tmp_path: Path, clock: AuthClock, key: IssuerKey, other_key: IssuerKey
) -> None:
    """A file with keys is read at the first token, and again after it has changed. Private and symmetric keys in it are
    ignored."""
    file = tmp_path / "keys.json"
    async with worker_that_trusts(tmp_path, clock, {"jwks_file": str(file)}) as worker:
        text = key.sign(claims(clock))
        await check_refused(worker, text)
        file.write_bytes(key_set(key.jwk(d="AAAA")))
        await check_refused(worker, text)
        file.write_bytes(key_set(key.jwk(use="enc"), {"kty": "oct", "k": "AAAA", "kid": "one"}))
        await check_refused(worker, text)
        file.write_bytes(key_set(key.jwk(), other_key.jwk()))
        assert await worker.access.credential_verifier.verify_bearer(text, KNOWN_ADDRESS)
        assert await worker.access.credential_verifier.verify_bearer(other_key.sign(claims(clock)), KNOWN_ADDRESS)


@pytest.mark.parametrize("content", [None, b"{", b"[" + b"0," * 200_000 + b"0]"], ids=["missing", "malformed", "large"])
async def test_a_file_without_keys_is_read_once(
    tmp_path: Path, clock: AuthClock, key: IssuerKey, caplog: pytest.LogCaptureFixture, content: bytes | None
) -> None:
    """A file that is missing, malformed or too large is read once, and the log says so once, however many tokens
    arrive. When the file has changed, it is read again."""
    file = tmp_path / "keys.json"
    if content is not None:
        file.write_bytes(content)
    async with worker_that_trusts(tmp_path, clock, {"jwks_file": str(file)}) as worker:
        for number in range(3):
            await check_refused(worker, key.sign(claims(clock, n=number)))
        assert caplog.text.count("tokens cannot be verified with the key set in") == 1
        file.write_bytes(key_set(key.jwk()))
        assert await worker.access.credential_verifier.verify_bearer(key.sign(claims(clock)), KNOWN_ADDRESS)


async def test_a_file_that_could_not_be_opened_is_opened_again(
    tmp_path: Path, clock: AuthClock, key: IssuerKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the file cannot be opened for a moment, for example because too many files are open, the next token is
    accepted, although the file has not changed."""
    file = tmp_path / "keys.json"
    file.write_bytes(key_set(key.jwk()))
    async with worker_that_trusts(tmp_path, clock, {"jwks_file": str(file)}) as worker:
        with monkeypatch.context() as patched:
            # Raises NotADirectoryError.
            patched.setattr(Path, "open", lambda *_: os.open("/dev/null/none", os.O_RDONLY))
            await check_refused(worker, key.sign(claims(clock)))
        assert await worker.access.credential_verifier.verify_bearer(key.sign(claims(clock, n=1)), KNOWN_ADDRESS)


async def test_token_without_a_key_id(tmp_path: Path, clock: AuthClock, key: IssuerKey, other_key: IssuerKey) -> None:
    """A token without a key id is accepted if exactly one key of the issuer can have signed it."""
    file = tmp_path / "keys.json"
    file.write_bytes(key_set(key.jwk()))
    async with worker_that_trusts(tmp_path, clock, {"jwks_file": str(file)}) as worker:
        text = key.sign(claims(clock), kid=None)
        assert await worker.access.credential_verifier.verify_bearer(text, KNOWN_ADDRESS)
        file.write_bytes(key_set(key.jwk(), other_key.jwk()))
        with pytest.raises(Unauthorized):
            await worker.access.credential_verifier.verify_bearer(key.sign(claims(clock, n=1), kid=None), KNOWN_ADDRESS)


async def test_eddsa_and_a_long_header(tmp_path: Path, clock: AuthClock) -> None:
    """A token signed with EdDSA is accepted if the settings allow EdDSA, even if its header has a long certificate. A
    key for key agreement (X25519) is ignored."""
    signing, other = OKPKey.generate_key("Ed25519"), OKPKey.generate_key("X25519")
    file = tmp_path / "keys.json"
    file.write_bytes(key_set(dict(other.as_dict()), dict(signing.as_dict())))
    async with worker_that_trusts(tmp_path, clock, {"jwks_file": str(file), "algorithms": ["EdDSA"]}) as worker:
        text = signed_token({"alg": "EdDSA", "x5c": ["A" * 4000]}, claims(clock), signing)
        assert (await worker.access.credential_verifier.verify_bearer(text, KNOWN_ADDRESS)).name == CI
        await check_refused(worker, signed_token({"alg": "EdDSA"}, claims(clock), OKPKey.generate_key("Ed25519")))


async def test_an_expiry_beyond_the_range_of_floats_is_refused(worker: AuthWorker, key: IssuerKey) -> None:
    """An expiry that is too large for a float is refused like any invalid token."""
    await check_refused(worker, key.sign({**claims(worker.clock), "exp": 10**400}))


def test_short_rsa_keys_are_ignored() -> None:
    """An RSA key of 1024 bits is ignored, because it is short enough to be factored."""
    assert not jwks.parse_key_set(key_set(IssuerKey("short", "RS256", 1024).jwk()))
    assert len(jwks.parse_key_set(key_set(IssuerKey("long", "RS256").jwk()))) == 1
