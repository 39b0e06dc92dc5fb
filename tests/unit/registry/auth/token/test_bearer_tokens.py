"""The bearer tokens that `/token` issues, and attempts to forge them."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from registry.auth.authorization_header import INVALID_CREDENTIALS, Bearer
from registry.auth.revocation_across_workers import principal_of
from registry.auth.rights.policy import Policy
from registry.auth.rights.principal import ANONYMOUS, CATALOG, Identity
from registry.auth.token.bearer_tokens import MAX_TOKEN_CHARACTERS, BearerTokens
from registry.auth.token.signing_keys import RETIRED_KEY_SECONDS, make_key, rotate
from registry.request import RequestInvalid
from storage.access import Action
from storage.errors import Unauthorized
from tests.fakes.auth_worker import ADMIN, ALICE, CI, KNOWN_ADDRESS, PASSWORD, AuthClock, AuthWorker, auth_worker
from tests.fakes.token_issuer import signed_token

ACCESS = {"team/app": Action.PULL | Action.PUSH, CATALOG: Action.PULL}
"""The access that the tokens of these tests have."""


@pytest.fixture
def tokens(worker: AuthWorker) -> BearerTokens:
    return worker.access.bearer_tokens


async def identity_of_alice(worker: AuthWorker) -> Identity:
    return await worker.access.credential_verifier.verify_basic(ALICE, PASSWORD, KNOWN_ADDRESS)


async def issue_token(worker: AuthWorker) -> str:
    return (await worker.access.bearer_tokens.issue(await identity_of_alice(worker), ACCESS)).text


def decode(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the header and the claims of a token, without a check of the signature."""
    header, claims = (base64.urlsafe_b64decode(part + "==") for part in text.split(".")[:2])
    return json.loads(header), json.loads(claims)


def encode(value: bytes | dict[str, Any]) -> str:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def sign(header: dict[str, Any], claims: dict[str, Any], secret: bytes) -> str:
    """Returns a token that is signed with HMAC, whatever algorithm its header names."""
    text = f"{encode(header)}.{encode(claims)}"
    return f"{text}.{encode(hmac.new(secret, text.encode(), hashlib.sha256).digest())}"


async def check_refused(worker: AuthWorker, text: str) -> None:
    """Checks that a token is refused with the usual text."""
    with pytest.raises(Unauthorized) as error:
        await worker.access.credential_verifier.verify_bearer(text, KNOWN_ADDRESS)
    assert error.value.message == "the credentials are not valid"


async def test_a_token_proves_its_account(worker: AuthWorker) -> None:
    """A token proves the account that requested it, with the granted access, until it expires."""
    proof = await worker.access.credential_verifier.verify_bearer(await issue_token(worker), KNOWN_ADDRESS)
    account, key = worker.accounts.account(ALICE), worker.accounts.signing_keys()[0]
    assert proof == Identity(ALICE, version=account.version, key_id=key.id, access=ACCESS, expires=worker.clock() + 300)


async def test_the_form_of_a_token(worker: AuthWorker) -> None:
    """The token's access has the format of Distribution, the reference registry. Its issuer is the store's id, and its
    audience is the service."""
    header, claims = decode(await issue_token(worker))
    key = worker.accounts.signing_keys()[0]
    assert header == {"alg": "HS256", "typ": "JWT", "kid": key.id}
    assert claims["access"] == [
        {"type": "repository", "name": "team/app", "actions": ["pull", "push"]},
        {"type": "registry", "name": "catalog", "actions": ["*"]},
    ]
    assert (claims["iss"], claims["aud"], claims["sub"]) == (worker.accounts.instance_id(), "entrepot", "alice")
    assert claims["exp"] - claims["iat"] == 300
    assert claims["nbf"] == claims["iat"] == int(worker.clock())
    assert decode(await issue_token(worker))[1]["jti"] != claims["jti"]


async def test_an_anonymous_token(worker: AuthWorker) -> None:
    """An anonymous token has no account, but has the access that was granted."""
    text = (await worker.access.bearer_tokens.issue(ANONYMOUS, {"public/app": Action.PULL})).text
    proof = await worker.access.credential_verifier.verify_bearer(text, KNOWN_ADDRESS)
    assert proof.name is None
    assert proof.access == {"public/app": Action.PULL}


async def test_a_token_never_has_the_action_admin(worker: AuthWorker, tokens: BearerTokens) -> None:
    """A token never has the action `admin` (to grant rights), even if it was requested."""
    text = (await tokens.issue(await identity_of_alice(worker), {"team/app": Action.PULL | Action.ADMIN})).text
    assert tokens.verify(text).access == {"team/app": Action.PULL}


async def test_a_token_that_is_too_long_is_not_issued(worker: AuthWorker, tokens: BearerTokens) -> None:
    """A token that this registry would refuse as too long is not issued: one with 100 long names of repositories and
    100 long groups. A token with the names alone, or with the groups alone, can be verified."""
    names = {f"{'a' * 76}{number:04}": Action.PULL | Action.PUSH | Action.DELETE for number in range(100)}
    alice = await identity_of_alice(worker)
    with_groups = replace(alice, groups=tuple(f"{number:03}{'g' * 60}" for number in range(100)))
    for identity, access in ((alice, names), (with_groups, {})):
        assert tokens.verify((await tokens.issue(identity, access)).text).access == access
    with pytest.raises(RequestInvalid, match="request fewer repositories"):
        await tokens.issue(with_groups, names)


async def test_a_token_expires(worker: AuthWorker) -> None:
    """A token is accepted until it expires, whether or not it is cached."""
    text, not_cached = await issue_token(worker), await issue_token(worker)
    assert await worker.access.credential_verifier.verify_bearer(text, KNOWN_ADDRESS)
    worker.clock.now = int(worker.clock.now) + 299
    assert await worker.access.credential_verifier.verify_bearer(text, KNOWN_ADDRESS)
    worker.clock.now += 1
    await check_refused(worker, text)
    await check_refused(worker, not_cached)


async def test_the_lifetime_depends_on_the_credential(worker: AuthWorker) -> None:
    """A token expires no later than the credential with which it was requested. Its stated lifetime is at least a
    minute, which is the shortest that clients assume."""
    await worker.add_robot()
    for seconds_left, lifetime in ((1000, 300), (100, 100), (10, 60)):
        api_token = await worker.add_token(CI, expires=worker.clock() + seconds_left)
        proof = await worker.access.credential_verifier.verify_basic(CI, api_token.text, KNOWN_ADDRESS)
        issued = await worker.access.bearer_tokens.issue(proof, {})
        assert issued.lifetime == lifetime
        assert await worker.access.credential_verifier.verify_bearer(issued.text, KNOWN_ADDRESS)
    worker.clock.now += 11
    await check_refused(worker, issued.text)  # the API token has expired


Change = Callable[[dict[str, Any], dict[str, Any], float], None]
"""A change of a token's header and claims. The third argument is the current time."""


def set_claim(name: str, value: Any) -> Change:
    return lambda header, claims, now: claims.__setitem__(name, value)


def set_time(name: str, seconds: float) -> Change:
    return lambda header, claims, now: claims.__setitem__(name, now + seconds)


def remove_claim(name: str) -> Change:
    return lambda header, claims, now: claims.pop(name)


def set_header(**fields: Any) -> Change:
    return lambda header, claims, now: header.update(fields)


CHANGES = {
    "expired": set_time("exp", -1),
    "expires now": set_time("exp", 0),
    "not valid yet": set_time("nbf", 60),
    "from the future": set_time("iat", 60),
    "other audience": set_claim("aud", "another"),
    "several audiences": set_claim("aud", ["entrepot", "another"]),
    "other issuer": set_claim("iss", "another"),
    "no issuer": remove_claim("iss"),
    "no audience": remove_claim("aud"),
    "no expiry": remove_claim("exp"),
    "no begin": remove_claim("nbf"),
    "no time": remove_claim("iat"),
    "no subject": remove_claim("sub"),
    "no id": remove_claim("jti"),
    "no access": remove_claim("access"),
    "expiry is text": set_claim("exp", "9999999999"),
    "expiry is true": set_claim("exp", True),
    "expiry is huge": set_claim("exp", 1e400),
    "expiry is null": set_claim("exp", None),
    "begin is a list": set_claim("nbf", [0]),
    "subject is a number": set_claim("sub", 7),
    "access is text": set_claim("access", "all"),
    "access of nothing": set_claim("access", [{"type": "repository", "name": "a", "actions": ["everything"]}]),
    "another's version": set_claim("version", 1),
    "no version": remove_claim("version"),
    "another account": set_claim("sub", "bob"),
    "an API token of nobody": set_claim("token", "0123456789ab"),
    "a stamp of nothing": set_claim("stamp", "htpasswd:0"),
    "other kind": set_header(typ="at+jwt"),
    "no kind": lambda header, claims, now: header.pop("typ"),
    "none": set_header(alg="none"),
    "None": set_header(alg="nOnE"),
    "other length": set_header(alg="HS512"),
    "public key": set_header(alg="RS256"),
    "critical": set_header(crit=["exp"]),
    "a key's address": set_header(jku="http://203.0.113.1/keys"),
    "a key of its own": set_header(jwk={"kty": "oct", "k": "AAAA"}),
    "unknown key": set_header(kid="0" * 18),
    "key's path": set_header(kid="../../dev/null"),
    "no key": lambda header, claims, now: header.pop("kid"),
    "key is a number": set_header(kid=1),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.slow
async def test_a_token_with_wrong_claims_is_refused(worker: AuthWorker, name: str) -> None:
    """A token with the right signature and wrong claims is refused."""
    header, claims = decode(await issue_token(worker))
    secret = worker.accounts.signing_keys()[0].secret
    assert await worker.access.credential_verifier.verify_bearer(sign(header, claims, secret), KNOWN_ADDRESS)
    CHANGES[name](header, claims, worker.clock())
    await check_refused(worker, sign(header, claims, secret))


async def test_the_clock_is_set_back_a_little(worker: AuthWorker) -> None:
    """If the clock is set back by a few seconds, tokens that were just issued are still accepted. If it is set back by
    more, they are refused."""
    text = await issue_token(worker)
    worker.clock.now -= 4
    assert await worker.access.credential_verifier.verify_bearer(text, KNOWN_ADDRESS)
    worker.clock.now -= 4
    with pytest.raises(Unauthorized):
        worker.access.bearer_tokens.verify(text)


@pytest.mark.parametrize(
    "replaced", ["header", "claims", "signature", "no signature", "empty", "two parts", "four parts"]
)
@pytest.mark.slow
async def test_a_token_with_a_replaced_part_is_refused(worker: AuthWorker, replaced: str) -> None:
    """If any part of a token is replaced, the token is refused."""
    header, claims, signature = (await issue_token(worker)).split(".")
    more_access = decode(f"{header}.{claims}.{signature}")[1]
    more_access["access"][0]["actions"] = ["pull", "push", "delete"]
    wrong = {
        "header": f"{encode({**decode(f'{header}.{claims}.x')[0], 'x': 1})}.{claims}.{signature}",
        "claims": f"{header}.{encode(more_access)}.{signature}",
        "signature": f"{header}.{claims}.{encode(bytes(32))}",
        "no signature": f"{header}.{claims}.",
        "empty": "..",
        "two parts": f"{header}.{claims}",
        "four parts": f"{header}.{claims}.{signature}.{signature}",
    }[replaced]
    await check_refused(worker, wrong)


@pytest.mark.parametrize(
    "text", ["", "x", "a.b.c", "é.é.é", "e30.e30.e30", "[" * 5000, "a" * (MAX_TOKEN_CHARACTERS + 1), "ent_a_b"]
)
async def test_a_text_that_is_not_a_token_is_refused(worker: AuthWorker, text: str) -> None:
    """A text that is not a token is refused."""
    await check_refused(worker, text)


async def test_an_unsigned_token_is_refused(worker: AuthWorker) -> None:
    """A token with the algorithm `none` is refused. The library for tokens can make one."""
    _, claims = decode(await issue_token(worker))
    header = {"alg": "none", "typ": "JWT", "kid": worker.accounts.signing_keys()[0].id}
    await check_refused(worker, signed_token(header, claims))


@pytest.mark.full_store
@pytest.mark.slow
async def test_a_token_of_another_store_is_refused(worker: AuthWorker, tmp_path: Path, clock: AuthClock) -> None:
    """A token of another registry is refused, even if it names a key of this registry or is signed with it."""
    async with auth_worker(tmp_path / "other", clock) as other_worker:
        await other_worker.add_user(ALICE)
        text = await issue_token(other_worker)
        assert await other_worker.access.credential_verifier.verify_bearer(text, KNOWN_ADDRESS)
        await check_refused(worker, text)
        await issue_token(worker)
        header, claims = decode(text)
        header["kid"] = worker.accounts.signing_keys()[0].id
        await check_refused(worker, sign(header, claims, other_worker.accounts.signing_keys()[0].secret))
        # Even with the right key, the issuer in the claims is the other store.
        await check_refused(worker, sign(header, claims, worker.accounts.signing_keys()[0].secret))


async def test_a_token_for_another_service_is_refused(data: Path, worker: AuthWorker, clock: AuthClock) -> None:
    """A token for another service is refused, although the store and the key are the same."""
    async with auth_worker(data, clock, {"auth": {"service": "elsewhere"}}) as other_worker:
        await check_refused(worker, await issue_token(other_worker))


async def test_rotation_of_the_signing_key(worker: AuthWorker) -> None:
    """After a rotation, new tokens are signed with the new key. Tokens that were signed with the old key are accepted
    until they expire. Then the old key is removed."""
    old = await issue_token(worker)
    first = worker.accounts.signing_keys()[0].id
    await rotate(worker.accounts, worker.clock(), ADMIN)
    new = await issue_token(worker)
    assert decode(new)[0]["kid"] != decode(old)[0]["kid"] == first
    for text in (old, new):
        assert await worker.access.credential_verifier.verify_bearer(text, KNOWN_ADDRESS)
    header, claims = decode(old)
    claims["exp"] += 10 * RETIRED_KEY_SECONDS
    forged = sign(header, claims, worker.accounts.signing_keys()[1].secret)
    assert worker.access.bearer_tokens.verify(forged)
    worker.clock.now += RETIRED_KEY_SECONDS + 1
    with pytest.raises(Unauthorized):  # although this worker has not read the keys again
        worker.access.bearer_tokens.verify(forged)
    assert [key.id for key in worker.accounts.signing_keys()] == [decode(new)[0]["kid"]]


async def test_a_key_that_is_retired_at_once(worker: AuthWorker) -> None:
    """If a key is retired at once, for example because it was stolen, all tokens signed with it are refused, even those
    that are cached."""
    text = await issue_token(worker)
    assert await worker.access.credential_verifier.verify_bearer(text, KNOWN_ADDRESS)
    await worker.accounts.rotate_key(make_key(worker.clock()), keep_seconds=0.0, by=ADMIN)
    await check_refused(worker, text)


@pytest.mark.parametrize("is_anonymous", [False, True], ids=["alice", "anonymous"])
async def test_a_key_that_is_retired_at_once_ends_requests_in_progress(worker: AuthWorker, is_anonymous: bool) -> None:
    """A key can be retired at once while a request with one of its tokens is in progress. Such a request is refused if
    its token was verified, but its rights were not read yet. If its rights were read, it is refused when they are
    checked again, as after a slow push. Later requests with the tokens are refused, too."""
    policy = Policy(worker.accounts, worker.access.revocation_check)
    identity = ANONYMOUS if is_anonymous else await identity_of_alice(worker)
    text, text_of_push = [(await worker.access.bearer_tokens.issue(identity, ACCESS)).text for _ in range(2)]
    verify = worker.access.credential_verifier.verify
    verified, verified_push = [await verify(Bearer(each), KNOWN_ADDRESS) for each in (text, text_of_push)]
    principal_of_push = await principal_of(policy, verified_push)
    await worker.accounts.rotate_key(make_key(worker.clock()), keep_seconds=0.0, by=ADMIN)
    with pytest.raises(Unauthorized, match=INVALID_CREDENTIALS):
        await principal_of(policy, verified)
    with pytest.raises(Unauthorized, match=INVALID_CREDENTIALS):
        await policy.reevaluate(principal_of_push)
    assert verified.principal is None
    for each in (text, text_of_push):
        await check_refused(worker, each)


@pytest.fixture
async def other_worker(data: Path, clock: AuthClock, worker: AuthWorker) -> AsyncIterator[AuthWorker]:
    """Yields a second worker on the same store."""
    async with auth_worker(data, clock) as opened:
        yield opened


async def test_workers_share_the_first_key(worker: AuthWorker, other_worker: AuthWorker) -> None:
    """Workers that start on a new store make only one key, and accept each other's tokens."""
    texts = [(await each.access.bearer_tokens.issue(ANONYMOUS, {})).text for each in (worker, other_worker)]
    for each in (worker, other_worker):
        for text in texts:
            assert await each.access.credential_verifier.verify_bearer(text, KNOWN_ADDRESS)
    assert len(worker.accounts.signing_keys()) == 1


@pytest.mark.parametrize("change", ["disabled", "password", "removed", "admin"])
@pytest.mark.slow
async def test_changes_of_the_account_end_tokens_on_every_worker(
    worker: AuthWorker, other_worker: AuthWorker, change: str
) -> None:
    """When the account is disabled or removed, gets another password, or becomes an admin, its bearer tokens are
    refused at the next request on every worker, even those that are cached."""
    text = await issue_token(worker)
    for each in (worker, other_worker):
        assert await each.access.credential_verifier.verify_bearer(text, KNOWN_ADDRESS)
    accounts = other_worker.accounts
    if change == "disabled":
        await accounts.set_enabled(ALICE, False, by=ADMIN)
        await accounts.set_enabled(ALICE, True, by=ADMIN)
    elif change == "password":
        await accounts.set_password(ALICE, None, by=ADMIN)
    elif change == "removed":
        await accounts.remove_account(ALICE, by=ADMIN)
        await other_worker.add_user(ALICE)
    else:
        await accounts.set_admin(ALICE, True, by=ADMIN)
    for each in (worker, other_worker):
        await check_refused(each, text)


async def test_unrelated_changes_end_no_token(worker: AuthWorker) -> None:
    """After an unrelated change in the store, the worker checks its cached credentials again, and still accepts the
    valid ones."""
    text = await issue_token(worker)
    proof = await worker.access.credential_verifier.verify_bearer(text, KNOWN_ADDRESS)
    await worker.add_robot()
    assert await worker.access.credential_verifier.verify_bearer(text, KNOWN_ADDRESS) == proof


async def test_a_bearer_token_ends_with_its_api_token(worker: AuthWorker, other_worker: AuthWorker) -> None:
    """A bearer token that was requested with an API token names the API token, and is refused once the API token is
    revoked."""
    await worker.add_robot()
    api_token = await worker.add_token(CI)
    proof = await worker.access.credential_verifier.verify_basic(CI, api_token.text, KNOWN_ADDRESS)
    text = (await worker.access.bearer_tokens.issue(proof, ACCESS)).text
    identity = await other_worker.access.credential_verifier.verify_bearer(text, KNOWN_ADDRESS)
    assert (identity.name, identity.robot, identity.token) == (CI, True, api_token.token.id)
    await worker.accounts.revoke_token(api_token.token.id, by=ADMIN)
    await check_refused(other_worker, text)
