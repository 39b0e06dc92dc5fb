"""API tokens: their form, what the store has of them, and logins with them."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from registry.auth.token import api_tokens
from storage.access import Action, TokenLimit
from storage.errors import Unauthorized
from storage.patterns import NamePattern
from tests.fakes.auth_worker import ADMIN, ALICE, BOB, CI, KNOWN_ADDRESS, OTHER_ADDRESS, AuthWorker


def test_the_form_of_a_token() -> None:
    """A token is `ent_ID_SECRET` in letters and digits. All tokens differ. `repr` shows neither the token's text nor
    its secret."""
    tokens = [api_tokens.make(ALICE, now=1.0) for _ in range(100)]
    assert all(re.fullmatch(r"ent_[0-9A-Za-z]{12}_[0-9A-Za-z]{43}", each.text) for each in tokens)
    assert len({each.token.id for each in tokens}) == len({each.text for each in tokens}) == 100
    assert tokens[0].text not in repr(tokens[0])
    assert tokens[0].text.rpartition("_")[2] not in repr(tokens[0])
    assert tokens[0].text.split("_")[1] == tokens[0].token.id


def test_the_secret_has_256_bits() -> None:
    """Random bytes that differ in one of 256 bits give different secrets."""
    zero = api_tokens.make(ALICE, now=1.0, random=bytes).text
    texts = {zero}
    for bit in range(256):
        raw = (1 << bit).to_bytes(32, "big")
        texts.add(api_tokens.make(ALICE, now=1.0, random=lambda size, raw=raw: raw[-size:]).text)  # type: ignore[misc]
    assert len({text.rpartition("_")[2] for text in texts}) == 257


async def test_log_in_with_a_token(worker: AuthWorker) -> None:
    """A login with a token has the token's account, limits and expiry. The time of the last use is recorded once an
    hour."""
    await worker.add_robot()
    limits = (TokenLimit(NamePattern("team/**"), Action.PULL),)
    token = await worker.add_token(CI, limits=limits, expires=worker.clock() + 7200)
    proof = await worker.access.credential_verifier.verify_basic(CI, token.text, KNOWN_ADDRESS)
    assert (proof.name, proof.robot, proof.token) == (CI, True, token.token.id)
    assert proof.limits == limits
    assert proof.expires == worker.clock() + 7200
    assert proof.access is None
    last_use = api_tokens.find(worker.accounts, token.text).used
    while last_use is None:  # the use is recorded in the background, and the login does not wait for this
        await worker.accounts.clear_failures([])  # an empty write, which waits for all earlier writes
        last_use = api_tokens.find(worker.accounts, token.text).used
    assert last_use == worker.clock()
    worker.clock.now += 60
    assert not api_tokens.should_record_use(api_tokens.find(worker.accounts, token.text), worker.clock())
    worker.clock.now += 3600
    assert api_tokens.should_record_use(api_tokens.find(worker.accounts, token.text), worker.clock())


@pytest.mark.parametrize(
    ("used_at", "is_due"), [(10_000.0, False), (10_050.0, False), (10_100.0, True), (6400.0, True)]
)
def test_use_of_the_future_does_not_count(used_at: float, is_due: bool) -> None:
    """A use is recorded unless one was recorded in the last hour. A recorded use in the future does not count, because
    the clock was set back. A use of a process that is a moment ahead counts."""
    token = replace(api_tokens.make(ALICE, now=1.0).token, used=used_at)
    assert api_tokens.should_record_use(token, 10_000.0) == is_due


@pytest.mark.parametrize("change", ["secret", "id", "user", "shorter", "prefix"])
async def test_a_wrong_token_is_refused(worker: AuthWorker, change: str) -> None:
    """A token with another secret or id, a token of another account, and a part of a token are refused with the same
    text."""
    await worker.add_user(BOB, None)
    token = await worker.add_token(ALICE)
    other_token = await worker.add_token(ALICE)
    user, text = "alice", token.text
    if change == "secret":
        text = text[:-1] + ("a" if text[-1] != "a" else "b")
    elif change == "id":
        text = other_token.text[:17] + token.text[17:]
    elif change == "user":
        user = "bob"
    elif change == "shorter":
        text = text[:-1]
    else:
        text = "x" + text
    with pytest.raises(Unauthorized) as refused:
        await worker.access.credential_verifier.verify_basic(user, text, KNOWN_ADDRESS)
    assert refused.value.message == "the credentials are not valid"


async def test_revoked_and_expired_tokens_are_refused(worker: AuthWorker) -> None:
    """A revoked or expired token is refused at the next request, although an earlier successful check is cached."""
    credentials = worker.access.credential_verifier
    revoked = await worker.add_token(ALICE)
    expiring = await worker.add_token(ALICE, expires=worker.clock() + 60)
    for each in (revoked, expiring):
        assert await credentials.verify_basic(ALICE, each.text, KNOWN_ADDRESS)
    await worker.accounts.revoke_token(revoked.token.id, by=ADMIN)
    with pytest.raises(Unauthorized):
        await credentials.verify_basic(ALICE, revoked.text, KNOWN_ADDRESS)
    assert await credentials.verify_basic(ALICE, expiring.text, KNOWN_ADDRESS)
    worker.clock.now += 60
    with pytest.raises(Unauthorized):
        await credentials.verify_basic(ALICE, expiring.text, KNOWN_ADDRESS)


async def test_wrong_tokens_do_not_delay_logins(worker: AuthWorker) -> None:
    """Logins with wrong tokens do not delay later logins. A delay is not needed, because nobody can guess 256 bits."""
    token = await worker.add_token(ALICE)
    wrong_token = api_tokens.make(ALICE, now=1.0)
    for _ in range(200):
        with pytest.raises(Unauthorized):
            await worker.access.credential_verifier.verify_basic(ALICE, wrong_token.text, OTHER_ADDRESS)
    assert await worker.access.credential_verifier.verify_basic(ALICE, token.text, OTHER_ADDRESS)


async def test_a_refresh_token_is_not_accepted_as_a_password(worker: AuthWorker) -> None:
    """A refresh token is accepted at `/token` only."""
    token = await worker.add_token(ALICE, purpose="login")
    with pytest.raises(Unauthorized):
        await worker.access.credential_verifier.verify_basic(ALICE, token.text, KNOWN_ADDRESS)
    assert (await worker.access.credential_verifier.verify_api_token(token.text, KNOWN_ADDRESS)).token == token.token.id


async def test_a_token_of_a_disabled_account_is_refused(worker: AuthWorker) -> None:
    """A token of a disabled account is refused."""
    token = await worker.add_token(ALICE)
    assert await worker.access.credential_verifier.verify_basic(ALICE, token.text, KNOWN_ADDRESS)
    await worker.accounts.set_enabled(ALICE, False, by=ADMIN)
    for verify in (
        worker.access.credential_verifier.verify_basic(ALICE, token.text, KNOWN_ADDRESS),
        worker.access.credential_verifier.verify_api_token(token.text, KNOWN_ADDRESS),
    ):
        with pytest.raises(Unauthorized):
            await verify
