"""Tokens of trusted issuers, such as CI systems: which tokens are accepted, and for which account."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from joserfc.jwk import OKPKey
from pydantic import ValidationError

from registry.auth.rights.management_rights import management_rights_of
from registry.auth.rights.policy import Policy
from registry.config.auth_settings import Issuer
from storage.access import AccountName
from storage.errors import Denied, Unauthorized
from tests.fakes.auth_worker import ADMIN, ALICE, CI, KNOWN_ADDRESS, AuthClock, AuthWorker, auth_worker
from tests.fakes.issuer_worker import check_refused, claims, worker_that_trusts
from tests.fakes.token_issuer import AUDIENCE, ISSUER, IssuerKey, KeySetServer, key_set, signed_token


async def test_a_token_logs_in_as_a_robot(
    trusting_worker: AuthWorker, key_server: KeySetServer, key: IssuerKey, rsa_key: IssuerKey
) -> None:
    """An issuer's token logs in as a bearer token, and as the robot's password. The keys are fetched once, at the first
    token and not when the server starts."""
    assert key_server.request_count == 0
    for each in (key, rsa_key):
        text = each.sign(claims(trusting_worker.clock))
        for proof in (
            await trusting_worker.access.credential_verifier.verify_bearer(text, KNOWN_ADDRESS),
            await trusting_worker.access.credential_verifier.verify_basic(CI, text, KNOWN_ADDRESS),
        ):
            assert (proof.name, proof.robot, proof.access) == (CI, True, None)
            assert proof.version == trusting_worker.accounts.account(CI).version
    assert key_server.request_count == 1
    with pytest.raises(Unauthorized):
        await trusting_worker.access.credential_verifier.verify_basic(
            ALICE, key.sign(claims(trusting_worker.clock)), KNOWN_ADDRESS
        )
    lines = await trusting_worker.audited()
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
async def test_a_token_with_wrong_claims_is_refused(trusting_worker: AuthWorker, key: IssuerKey, name: str) -> None:
    """A token that the issuer signed for another service or another time is refused."""
    token_claims = claims(trusting_worker.clock)
    value: Any
    for claim, value in WRONG_CLAIMS[name].items():
        token_claims[claim] = trusting_worker.clock() + value if isinstance(value, int) else value
    await check_refused(
        trusting_worker, key.sign({claim: value for claim, value in token_claims.items() if value is not None})
    )
    assert await trusting_worker.access.credential_verifier.verify_bearer(
        key.sign(claims(trusting_worker.clock)), KNOWN_ADDRESS
    )


async def test_a_token_with_a_wrong_signature_is_refused(
    trusting_worker: AuthWorker, key: IssuerKey, rsa_key: IssuerKey
) -> None:
    """A token is refused if another key with the same id signed it, if its key id is unknown, if it has no signature,
    or if its header has a key or a key's URL. It is also refused if it is signed with HMAC and the public key as the
    secret."""
    token_claims = claims(trusting_worker.clock)
    await check_refused(trusting_worker, IssuerKey("one").sign(token_claims))
    await check_refused(trusting_worker, IssuerKey("unknown").sign(token_claims))
    await check_refused(trusting_worker, key.sign(token_claims).rpartition(".")[0] + ".")
    await check_refused(trusting_worker, key.sign(token_claims, crit=["exp"]))
    stranger = IssuerKey("stranger")
    await check_refused(trusting_worker, stranger.sign(token_claims, jwk=stranger.jwk(), jku="http://203.0.113.9/"))
    public = rsa_key.private.public_key()
    forms = (
        (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo),
        (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo),
        (serialization.Encoding.PEM, serialization.PublicFormat.PKCS1),
    )
    for form in forms:
        for algorithm in ("HS256", "none", "RS256"):
            await check_refused(trusting_worker, forged(algorithm, "rsa", token_claims, public.public_bytes(*form)))
    for key_id in (7, None, ["rsa"], "../../dev/null"):
        await check_refused(trusting_worker, forged("RS256", key_id, token_claims, b"x"))
    for nonsense in (7, None, ["RS256"]):
        await check_refused(trusting_worker, forged(nonsense, "rsa", token_claims, b"x"))


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


async def test_an_issuers_token_cannot_make_an_api_token(trusting_worker: AuthWorker, key: IssuerKey) -> None:
    """A client with an issuer's token cannot make an API token for the robot, because the API token would be valid for
    longer."""
    policy = Policy(trusting_worker.accounts, trusting_worker.access.revocation_check)
    text = key.sign(claims(trusting_worker.clock))
    for proof in (
        await trusting_worker.access.credential_verifier.verify_bearer(text, KNOWN_ADDRESS),
        await trusting_worker.access.credential_verifier.verify_basic(CI, text, KNOWN_ADDRESS),
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


async def test_a_cached_token_expires(trusting_worker: AuthWorker, key: IssuerKey) -> None:
    """A cached token is refused once it has expired."""
    text = key.sign(claims(trusting_worker.clock))
    assert await trusting_worker.access.credential_verifier.verify_bearer(text, KNOWN_ADDRESS)
    assert await trusting_worker.access.credential_verifier.verify_basic(CI, text, KNOWN_ADDRESS)
    trusting_worker.clock.now += 611
    await check_refused(trusting_worker, text)


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


async def test_an_expiry_beyond_the_range_of_floats_is_refused(trusting_worker: AuthWorker, key: IssuerKey) -> None:
    """An expiry that is too large for a float is refused like any invalid token."""
    await check_refused(trusting_worker, key.sign({**claims(trusting_worker.clock), "exp": 10**400}))
