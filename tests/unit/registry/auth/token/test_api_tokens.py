"""API tokens: their form, what is stored of them, and logins with them."""

from __future__ import annotations

import re

import pytest

from registry.auth.token import api_tokens
from storage.access import Action, TokenLimit
from storage.errors import Unauthorized
from storage.patterns import NamePattern
from tests.fakes.auth_worker import ADMIN, ALICE, AT_HOME, BOB, CI, ELSEWHERE, AuthWorker


def test_form() -> None:
    """A token is `ent_ID_SECRET` in letters and digits. No two are alike, and `repr` shows neither the text nor the
    hash."""
    made = [api_tokens.make(ALICE, now=1.0) for _ in range(100)]
    assert all(re.fullmatch(r"ent_[0-9A-Za-z]{12}_[0-9A-Za-z]{43}", each.text) for each in made)
    assert len({each.token.id for each in made}) == len({each.text for each in made}) == 100
    assert made[0].text not in repr(made[0])
    assert made[0].text.rpartition("_")[2] not in repr(made[0])
    assert made[0].text.split("_")[1] == made[0].token.id


def test_all_bits_are_in_it() -> None:
    """The secret has 256 bits: random bytes that differ in one bit make different secrets."""
    zero = api_tokens.make(ALICE, now=1.0, random=bytes).text
    texts = {zero}
    for bit in range(256):
        raw = (1 << bit).to_bytes(32, "big")
        texts.add(api_tokens.make(ALICE, now=1.0, random=lambda size, raw=raw: raw[-size:]).text)  # type: ignore[misc]
    assert len({text.rpartition("_")[2] for text in texts}) == 257


async def test_log_in(worker: AuthWorker) -> None:
    """A token proves its account, with its limits and its expiry. Its use is recorded once an hour."""
    await worker.add_robot()
    limits = (TokenLimit(NamePattern("team/**"), Action.PULL),)
    made = await worker.add_token(CI, limits=limits, expires=worker.clock() + 7200)
    proof = await worker.access.credential_verifier.verify_basic(CI, made.text, AT_HOME)
    assert (proof.name, proof.robot, proof.token) == (CI, True, made.token.id)
    assert proof.limits == limits
    assert proof.expires == worker.clock() + 7200
    assert proof.access is None
    used = api_tokens.find(worker.accounts, made.text).used
    while used is None:  # noted beside the login, which does not wait for it
        await worker.accounts.clear_failures([])
        used = api_tokens.find(worker.accounts, made.text).used
    assert used == worker.clock()
    worker.clock.now += 60
    assert not api_tokens.should_record_use(api_tokens.find(worker.accounts, made.text), worker.clock())
    worker.clock.now += 3600
    assert api_tokens.should_record_use(api_tokens.find(worker.accounts, made.text), worker.clock())


@pytest.mark.parametrize("change", ["secret", "id", "user", "shorter", "prefix"])
async def test_wrong_token(worker: AuthWorker, change: str) -> None:
    """Another secret, another id, another user's name, and a part of a token are refused with the same text."""
    await worker.add_user(BOB, None)
    made = await worker.add_token(ALICE)
    other = await worker.add_token(ALICE)
    user, text = "alice", made.text
    if change == "secret":
        text = text[:-1] + ("a" if text[-1] != "a" else "b")
    elif change == "id":
        text = other.text[:17] + made.text[17:]
    elif change == "user":
        user = "bob"
    elif change == "shorter":
        text = text[:-1]
    else:
        text = "x" + text
    with pytest.raises(Unauthorized) as refused:
        await worker.access.credential_verifier.verify_basic(user, text, AT_HOME)
    assert refused.value.message == "the credentials are not valid"


async def test_end_of_a_token(worker: AuthWorker) -> None:
    """A revoked or expired token is refused at the next request, although it was verified a moment ago."""
    credentials = worker.access.credential_verifier
    revoked = await worker.add_token(ALICE)
    expiring = await worker.add_token(ALICE, expires=worker.clock() + 60)
    for each in (revoked, expiring):
        assert await credentials.verify_basic(ALICE, each.text, AT_HOME)
    await worker.accounts.revoke_token(revoked.token.id, by=ADMIN)
    with pytest.raises(Unauthorized):
        await credentials.verify_basic(ALICE, revoked.text, AT_HOME)
    assert await credentials.verify_basic(ALICE, expiring.text, AT_HOME)
    worker.clock.now += 60
    with pytest.raises(Unauthorized):
        await credentials.verify_basic(ALICE, expiring.text, AT_HOME)


async def test_guessing_tokens_slows_nobody(worker: AuthWorker) -> None:
    """Failures with tokens throttle nobody, and cause no hashing: nobody can guess 256 bits."""
    made = await worker.add_token(ALICE)
    wrong = api_tokens.make(ALICE, now=1.0)
    for _ in range(200):
        with pytest.raises(Unauthorized):
            await worker.access.credential_verifier.verify_basic(ALICE, wrong.text, ELSEWHERE)
    assert await worker.access.credential_verifier.verify_basic(ALICE, made.text, ELSEWHERE)


async def test_a_refresh_token_is_no_password(worker: AuthWorker) -> None:
    """A refresh token is accepted at `/token` only."""
    made = await worker.add_token(ALICE, purpose="login")
    with pytest.raises(Unauthorized):
        await worker.access.credential_verifier.verify_basic(ALICE, made.text, AT_HOME)
    assert (await worker.access.credential_verifier.verify_api_token(made.text, AT_HOME)).token == made.token.id


async def test_token_of_a_disabled_account(worker: AuthWorker) -> None:
    """A token of a disabled account is refused."""
    made = await worker.add_token(ALICE)
    assert await worker.access.credential_verifier.verify_basic(ALICE, made.text, AT_HOME)
    await worker.accounts.set_enabled(ALICE, False, by=ADMIN)
    for verify in (
        worker.access.credential_verifier.verify_basic(ALICE, made.text, AT_HOME),
        worker.access.credential_verifier.verify_api_token(made.text, AT_HOME),
    ):
        with pytest.raises(Unauthorized):
            await verify
