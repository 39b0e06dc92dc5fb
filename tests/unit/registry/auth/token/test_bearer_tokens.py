"""The bearer tokens of `/token`, and attacks on them."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from registry.auth.rights.principal import ANONYMOUS, CATALOG, Identity
from registry.auth.token.bearer_tokens import MAX_TOKEN_CHARACTERS, BearerTokens
from registry.auth.token.signing_keys import RETIRED_KEY_SECONDS, make_key, rotate
from storage.access import Action
from storage.errors import Unauthorized
from tests.fakes.auth_worker import ADMIN, ALICE, AT_HOME, CI, PASSWORD, AuthClock, AuthWorker, auth_worker
from tests.fakes.token_issuer import signed_token

ACCESS = {"team/app": Action.PULL | Action.PUSH, CATALOG: Action.PULL}


@pytest.fixture
def tokens(worker: AuthWorker) -> BearerTokens:
    return worker.access.bearer_tokens


async def alices(worker: AuthWorker) -> Identity:
    return await worker.access.credential_verifier.verify_basic(ALICE, PASSWORD, AT_HOME)


async def token(worker: AuthWorker) -> str:
    return (await worker.access.bearer_tokens.issue(await alices(worker), ACCESS)).text


def parts(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the header and the claims of a token, unchecked."""
    header, claims = (base64.urlsafe_b64decode(part + "==") for part in text.split(".")[:2])
    return json.loads(header), json.loads(claims)


def encoded(value: bytes | dict[str, Any]) -> str:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def signed(header: dict[str, Any], claims: dict[str, Any], secret: bytes) -> str:
    """Returns a token signed with HMAC, whatever its header names."""
    text = f"{encoded(header)}.{encoded(claims)}"
    return f"{text}.{encoded(hmac.new(secret, text.encode(), hashlib.sha256).digest())}"


async def refused(worker: AuthWorker, text: str) -> None:
    """Checks that a token is refused with the usual text."""
    with pytest.raises(Unauthorized) as error:
        await worker.access.credential_verifier.verify_bearer(text, AT_HOME)
    assert error.value.message == "the credentials are not valid"


async def test_round_trip(worker: AuthWorker) -> None:
    """A token proves the account that requested it, with the granted access, until it expires."""
    proof = await worker.access.credential_verifier.verify_bearer(await token(worker), AT_HOME)
    account = worker.accounts.account(ALICE)
    assert proof == Identity(ALICE, version=account.version, access=ACCESS, expires=worker.clock() + 300)


async def test_form(worker: AuthWorker) -> None:
    """Its access has Distribution's format, its issuer is the store, its audience the service."""
    header, claims = parts(await token(worker))
    key = worker.accounts.signing_keys()[0]
    assert header == {"alg": "HS256", "typ": "JWT", "kid": key.id}
    assert claims["access"] == [
        {"type": "repository", "name": "team/app", "actions": ["pull", "push"]},
        {"type": "registry", "name": "catalog", "actions": ["*"]},
    ]
    assert (claims["iss"], claims["aud"], claims["sub"]) == (worker.accounts.instance_id(), "entrepot", "alice")
    assert claims["exp"] - claims["iat"] == 300
    assert claims["nbf"] == claims["iat"] == int(worker.clock())
    assert parts(await token(worker))[1]["jti"] != claims["jti"]


async def test_nobody(worker: AuthWorker) -> None:
    """An anonymous token proves no account, and holds its granted access."""
    text = (await worker.access.bearer_tokens.issue(ANONYMOUS, {"public/app": Action.PULL})).text
    proof = await worker.access.credential_verifier.verify_bearer(text, AT_HOME)
    assert proof.name is None
    assert proof.access == {"public/app": Action.PULL}


async def test_never_admin(worker: AuthWorker, tokens: BearerTokens) -> None:
    """A token carries no right to grant rights, even if it was requested."""
    text = (await tokens.issue(await alices(worker), {"team/app": Action.PULL | Action.ADMIN})).text
    assert tokens.verify(text).access == {"team/app": Action.PULL}


async def test_expiry(worker: AuthWorker) -> None:
    """A token is accepted until the second of its expiry, whether or not it is cached."""
    text, fresh = await token(worker), await token(worker)
    assert await worker.access.credential_verifier.verify_bearer(text, AT_HOME)
    worker.clock.now = int(worker.clock.now) + 299
    assert await worker.access.credential_verifier.verify_bearer(text, AT_HOME)
    worker.clock.now += 1
    await refused(worker, text)
    await refused(worker, fresh)


async def test_short_lived_origin(worker: AuthWorker) -> None:
    """A token expires at the same time as the credential with which it was requested. It lives for at least a minute,
    which is the shortest lifetime that clients assume."""
    await worker.add_robot()
    for left, lifetime in ((1000, 300), (100, 100), (10, 60)):
        made = await worker.add_token(CI, expires=worker.clock() + left)
        proof = await worker.access.credential_verifier.verify_basic(CI, made.text, AT_HOME)
        issued = await worker.access.bearer_tokens.issue(proof, {})
        assert issued.lifetime == lifetime
        assert await worker.access.credential_verifier.verify_bearer(issued.text, AT_HOME)
    worker.clock.now += 11
    await refused(worker, issued.text)  # the API token is no more


Change = Callable[[dict[str, Any], dict[str, Any], float], None]


def claim(name: str, value: Any) -> Change:
    return lambda header, claims, now: claims.__setitem__(name, value)


def later(name: str, seconds: float) -> Change:
    return lambda header, claims, now: claims.__setitem__(name, now + seconds)


def without(name: str) -> Change:
    return lambda header, claims, now: claims.pop(name)


def heading(**fields: Any) -> Change:
    return lambda header, claims, now: header.update(fields)


CHANGES = {
    "expired": later("exp", -1),
    "expires now": later("exp", 0),
    "not valid yet": later("nbf", 60),
    "from the future": later("iat", 60),
    "other audience": claim("aud", "another"),
    "several audiences": claim("aud", ["entrepot", "another"]),
    "other issuer": claim("iss", "another"),
    "no issuer": without("iss"),
    "no audience": without("aud"),
    "no expiry": without("exp"),
    "no begin": without("nbf"),
    "no time": without("iat"),
    "no subject": without("sub"),
    "no id": without("jti"),
    "no access": without("access"),
    "expiry is text": claim("exp", "9999999999"),
    "expiry is true": claim("exp", True),
    "expiry is huge": claim("exp", 1e400),
    "expiry is null": claim("exp", None),
    "begin is a list": claim("nbf", [0]),
    "subject is a number": claim("sub", 7),
    "access is text": claim("access", "all"),
    "access of nothing": claim("access", [{"type": "repository", "name": "a", "actions": ["everything"]}]),
    "another's version": claim("version", 1),
    "no version": without("version"),
    "another account": claim("sub", "bob"),
    "an API token of nobody": claim("token", "0123456789ab"),
    "a stamp of nothing": claim("stamp", "htpasswd:0"),
    "other kind": heading(typ="at+jwt"),
    "no kind": lambda header, claims, now: header.pop("typ"),
    "none": heading(alg="none"),
    "None": heading(alg="nOnE"),
    "other length": heading(alg="HS512"),
    "public key": heading(alg="RS256"),
    "critical": heading(crit=["exp"]),
    "a key's address": heading(jku="http://203.0.113.1/keys"),
    "a key of its own": heading(jwk={"kty": "oct", "k": "AAAA"}),
    "unknown key": heading(kid="0" * 18),
    "key's path": heading(kid="../../dev/null"),
    "no key": lambda header, claims, now: header.pop("kid"),
    "key is a number": heading(kid=1),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.slow
async def test_wrong_claims(worker: AuthWorker, name: str) -> None:
    """A token with the right signature and wrong claims is refused."""
    header, claims = parts(await token(worker))
    secret = worker.accounts.signing_keys()[0].secret
    assert await worker.access.credential_verifier.verify_bearer(signed(header, claims, secret), AT_HOME)
    CHANGES[name](header, claims, worker.clock())
    await refused(worker, signed(header, claims, secret))


async def test_clock_set_back_a_little(worker: AuthWorker) -> None:
    """A clock that was set back by a few seconds does not make fresh tokens invalid."""
    text = await token(worker)
    worker.clock.now -= 4
    assert await worker.access.credential_verifier.verify_bearer(text, AT_HOME)
    worker.clock.now -= 4
    worker.access.bearer_tokens.verify  # noqa: B018
    with pytest.raises(Unauthorized):
        worker.access.bearer_tokens.verify(text)


@pytest.mark.parametrize("where", ["header", "claims", "signature", "no signature", "empty", "two parts", "four parts"])
@pytest.mark.slow
async def test_tampered(worker: AuthWorker, where: str) -> None:
    """A token of which any part is replaced is refused."""
    header, claims, signature = (await token(worker)).split(".")
    more = parts(f"{header}.{claims}.{signature}")[1]
    more["access"][0]["actions"] = ["pull", "push", "delete"]
    wrong = {
        "header": f"{encoded({**parts(f'{header}.{claims}.x')[0], 'x': 1})}.{claims}.{signature}",
        "claims": f"{header}.{encoded(more)}.{signature}",
        "signature": f"{header}.{claims}.{encoded(bytes(32))}",
        "no signature": f"{header}.{claims}.",
        "empty": "..",
        "two parts": f"{header}.{claims}",
        "four parts": f"{header}.{claims}.{signature}.{signature}",
    }[where]
    await refused(worker, wrong)


@pytest.mark.parametrize(
    "text", ["", "x", "a.b.c", "é.é.é", "e30.e30.e30", "[" * 5000, "a" * (MAX_TOKEN_CHARACTERS + 1), "ent_a_b"]
)
async def test_nonsense(worker: AuthWorker, text: str) -> None:
    """A text that is no token is refused, and causes no failure."""
    await refused(worker, text)


async def test_unsigned(worker: AuthWorker) -> None:
    """A token with the algorithm `none`, as the library makes it, is refused."""
    _, claims = parts(await token(worker))
    header = {"alg": "none", "typ": "JWT", "kid": worker.accounts.signing_keys()[0].id}
    await refused(worker, signed_token(header, claims))


@pytest.mark.full_store
async def test_other_store(worker: AuthWorker, tmp_path: Path, clock: AuthClock) -> None:
    """A token of another registry is refused, even if it names a key of this registry."""
    async with auth_worker(tmp_path / "other", clock) as other:
        await other.add_user(ALICE)
        text = await token(other)
        assert await other.access.credential_verifier.verify_bearer(text, AT_HOME)
        await refused(worker, text)
        await token(worker)
        header, claims = parts(text)
        header["kid"] = worker.accounts.signing_keys()[0].id
        await refused(worker, signed(header, claims, other.accounts.signing_keys()[0].secret))
        await refused(worker, signed(header, claims, worker.accounts.signing_keys()[0].secret))  # another's issuer


async def test_other_service(data: Path, worker: AuthWorker, clock: AuthClock) -> None:
    """A token for another service is refused, though the store and the key are the same."""
    async with auth_worker(data, clock, {"auth": {"service": "elsewhere"}}) as other:
        await refused(worker, await token(other))


async def test_rotation(worker: AuthWorker) -> None:
    """A new key signs. Tokens that the old key signed are accepted until they expire; then the old key is removed."""
    old = await token(worker)
    first = worker.accounts.signing_keys()[0].id
    await rotate(worker.accounts, worker.clock(), ADMIN)
    new = await token(worker)
    assert parts(new)[0]["kid"] != parts(old)[0]["kid"] == first
    for text in (old, new):
        assert await worker.access.credential_verifier.verify_bearer(text, AT_HOME)
    header, claims = parts(old)
    claims["exp"] += 10 * RETIRED_KEY_SECONDS
    forged = signed(header, claims, worker.accounts.signing_keys()[1].secret)
    assert worker.access.bearer_tokens.verify(forged)
    worker.clock.now += RETIRED_KEY_SECONDS + 1
    with pytest.raises(Unauthorized):  # also where nothing has been read anew since
        worker.access.bearer_tokens.verify(forged)
    assert [key.id for key in worker.accounts.signing_keys()] == [parts(new)[0]["kid"]]


async def test_key_that_others_know(worker: AuthWorker) -> None:
    """A key that is retired at once ends all its tokens, also those that were verified a moment ago."""
    text = await token(worker)
    assert await worker.access.credential_verifier.verify_bearer(text, AT_HOME)
    await worker.accounts.rotate_key(make_key(worker.clock()), keep=0.0, by=ADMIN)
    await refused(worker, text)


@pytest.fixture
async def other(data: Path, clock: AuthClock, worker: AuthWorker) -> AsyncIterator[AuthWorker]:
    """Yields a second worker on the same store."""
    async with auth_worker(data, clock) as opened:
        yield opened


async def test_first_key_is_one_for_all(worker: AuthWorker, other: AuthWorker) -> None:
    """Workers that start on a new store accept each other's tokens."""
    texts = [(await each.access.bearer_tokens.issue(ANONYMOUS, {})).text for each in (worker, other)]
    for each in (worker, other):
        for text in texts:
            assert await each.access.credential_verifier.verify_bearer(text, AT_HOME)
    assert len(worker.accounts.signing_keys()) == 1


@pytest.mark.parametrize("ending", ["disabled", "password", "removed", "admin"])
async def test_revoked_on_every_worker(worker: AuthWorker, other: AuthWorker, ending: str) -> None:
    """After a revocation, the credential is refused at the next request on every worker, whether or not it was
    cached."""
    text = await token(worker)
    for each in (worker, other):
        assert await each.access.credential_verifier.verify_bearer(text, AT_HOME)
    accounts = other.accounts
    if ending == "disabled":
        await accounts.set_enabled(ALICE, False, by=ADMIN)
        await accounts.set_enabled(ALICE, True, by=ADMIN)
    elif ending == "password":
        await accounts.set_password(ALICE, None, by=ADMIN)
    elif ending == "removed":
        await accounts.remove_account(ALICE, by=ADMIN)
        await other.add_user(ALICE)
    else:
        await accounts.set_admin(ALICE, True, by=ADMIN)
    for each in (worker, other):
        await refused(each, text)


async def test_other_changes_end_nothing(worker: AuthWorker) -> None:
    """After an unrelated change, each worker checks its cached credentials again, and still accepts the valid ones."""
    text = await token(worker)
    proof = await worker.access.credential_verifier.verify_bearer(text, AT_HOME)
    await worker.add_robot()
    assert await worker.access.credential_verifier.verify_bearer(text, AT_HOME) == proof


async def test_token_of_an_api_token(worker: AuthWorker, other: AuthWorker) -> None:
    """A bearer token made with an API token has the API token's limits and ends with it."""
    await worker.add_robot()
    made = await worker.add_token(CI)
    proof = await worker.access.credential_verifier.verify_basic(CI, made.text, AT_HOME)
    text = (await worker.access.bearer_tokens.issue(proof, ACCESS)).text
    shown = await other.access.credential_verifier.verify_bearer(text, AT_HOME)
    assert (shown.name, shown.robot, shown.token) == (CI, True, made.token.id)
    await worker.accounts.revoke_token(made.token.id, by=ADMIN)
    await refused(other, text)
