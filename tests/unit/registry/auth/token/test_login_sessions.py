"""Login sessions of the web pages: what ends them on all workers. No other credential is accepted as a session."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from registry.auth.rights.principal import Identity
from registry.auth.token.login_sessions import SESSION_SECONDS, USE_RECORD_SECONDS
from registry.auth.token.signing_keys import make_key
from storage.access import AccountName, AccountUnknown
from storage.errors import StorageFull, Unauthorized
from storage.metadata.sqlite.access.login_session_table import MAX_SESSIONS_PER_ACCOUNT
from tests.fakes.auth_worker import ADMIN, ALICE, BOB, KNOWN_ADDRESS, OTHER_ADDRESS, AuthClock, AuthWorker, auth_worker


@pytest.fixture
async def other_worker(data: Path, clock: AuthClock, worker: AuthWorker) -> AsyncIterator[AuthWorker]:
    """Yields a second worker on the same store."""
    async with auth_worker(data, clock) as opened:
        yield opened


def identity_of(worker: AuthWorker, account: AccountName) -> Identity:
    """Returns the identity that a login to the account proves."""
    return Identity(account, version=worker.accounts.account(account).version)


async def start_session(worker: AuthWorker) -> str:
    return await worker.access.login_sessions.start(identity_of(worker, ALICE), "password", KNOWN_ADDRESS)


async def use_session(worker: AuthWorker, text: str) -> None:
    """Verifies the session, as for a request, and waits until the time of the request is in the store. The sessions can
    still be used after `aclose`, which only waits."""
    worker.access.login_sessions.verify(text)
    await worker.access.login_sessions.aclose()


def check_refused(worker: AuthWorker, text: str) -> None:
    """Checks that the session is not valid."""
    with pytest.raises(Unauthorized):
        worker.access.revocation_check.check(worker.access.login_sessions.verify(text))


async def test_a_session_lasts_eight_hours(worker: AuthWorker, other_worker: AuthWorker) -> None:
    """On every worker, a session has the identity that logged in, for eight hours. A new signing key does not end the
    session."""
    # `stamp` is a hash of the settings of the OpenID provider; the session has to keep it.
    identity_at_login = replace(identity_of(worker, ALICE), stamp="openid:x", groups=("dev",))
    text = await worker.access.login_sessions.start(identity_at_login, "openid", KNOWN_ADDRESS)
    await worker.accounts.rotate_key(make_key(worker.clock()), keep_seconds=0.0, by=ADMIN)
    worker.clock.now += SESSION_SECONDS - 1
    identity = other_worker.access.login_sessions.verify(text)
    assert replace(identity, session=None, expires=None) == identity_at_login
    assert identity.session == text.partition(".")[0]
    assert identity.expires == worker.clock() + 1
    worker.clock.now += 1
    check_refused(other_worker, text)
    assert other_worker.accounts.login_sessions(ALICE) == []


async def test_sessions_in_the_store_and_the_audit_log(worker: AuthWorker, other_worker: AuthWorker) -> None:
    """The store has the time, the address and the method of each login, but no secret. The audit log has the start and
    the end of each session."""
    first = await start_session(worker)
    worker.clock.now += 60
    second = await worker.access.login_sessions.start(identity_of(worker, ALICE), "openid", OTHER_ADDRESS)
    listed = other_worker.accounts.login_sessions(ALICE)
    assert [(each.id, each.method, each.address) for each in listed] == [
        (second.partition(".")[0], "openid", OTHER_ADDRESS.address),
        (first.partition(".")[0], "password", KNOWN_ADDRESS.address),
    ]
    assert {each.user_agent for each in listed} == {KNOWN_ADDRESS.user_agent}
    assert first.partition(".")[2] not in repr(listed)
    await worker.access.login_sessions.end(first, KNOWN_ADDRESS)
    (line,) = await worker.audited("session.end")
    assert (line.actor, line.target, line.address) == ("alice", "alice", KNOWN_ADDRESS.address)
    assert len(await worker.audited("session.start")) == 2


async def test_sessions_can_be_ended(worker: AuthWorker, other_worker: AuthWorker) -> None:
    """A session that was ended is refused at once on every worker. It can be ended alone, or with all other sessions of
    the account. Sessions of other accounts stay."""
    await worker.add_user(BOB)
    bobs = await worker.access.login_sessions.start(identity_of(worker, BOB), "password", KNOWN_ADDRESS)
    first, second, third = [await start_session(worker) for _ in range(3)]
    for text in (first, second, third):
        assert other_worker.access.login_sessions.verify(text).name == ALICE
    await worker.access.login_sessions.end(first, KNOWN_ADDRESS)
    await worker.access.login_sessions.end(first, KNOWN_ADDRESS)  # the second call does nothing
    check_refused(other_worker, first)
    second_id = second.partition(".")[0]
    assert await other_worker.accounts.end_login_sessions(ALICE, except_id=second_id, by=ADMIN) == 1
    check_refused(worker, third)
    assert worker.access.login_sessions.verify(second).session == second_id
    assert await other_worker.accounts.end_login_sessions(ALICE, by=ADMIN) == 1
    check_refused(worker, second)
    assert worker.access.login_sessions.verify(bobs).name == BOB
    with pytest.raises(AccountUnknown):
        await worker.accounts.end_login_session(second_id, by=ADMIN)


@pytest.mark.parametrize("change", ["password", "disabled", "admin", "removed"])
async def test_changes_of_the_account_end_its_sessions(
    worker: AuthWorker, other_worker: AuthWorker, change: str
) -> None:
    """Changes of the account's password, its admin rights or its state, and its removal, end its sessions. The sessions
    stay invalid if an account of the same name is added."""
    text = await start_session(worker)
    if change == "password":
        await other_worker.accounts.set_password(ALICE, None, by=ADMIN)
    elif change == "disabled":
        await other_worker.accounts.set_enabled(ALICE, False, by=ADMIN)
        await other_worker.accounts.set_enabled(ALICE, True, by=ADMIN)
    elif change == "admin":
        await other_worker.accounts.set_admin(ALICE, True, by=ADMIN)
    else:
        await other_worker.accounts.remove_account(ALICE, by=ADMIN)
        await other_worker.add_user(ALICE)
    check_refused(worker, text)
    assert worker.accounts.login_sessions(ALICE) == []


async def test_an_account_has_a_largest_number_of_sessions(worker: AuthWorker) -> None:
    """If an account has the largest number of sessions, a further login ends the session that was used least
    recently."""
    texts = []
    for _ in range(MAX_SESSIONS_PER_ACCOUNT):
        texts.append(await start_session(worker))
        worker.clock.now += 1
    worker.clock.now += USE_RECORD_SECONDS
    await use_session(worker, texts[0])
    await start_session(worker)
    assert worker.access.login_sessions.verify(texts[0])
    check_refused(worker, texts[1])
    assert len(worker.accounts.login_sessions(ALICE)) == MAX_SESSIONS_PER_ACCOUNT


async def test_sessions_of_the_future_do_not_end_new_ones(worker: AuthWorker) -> None:
    """An account got the largest number of sessions while the clock was a day ahead. The clock was set back, so the
    last requests with these sessions are in the future. A new login ends one of these sessions, and not its own, which
    seems to be the least recently used one. The time of a later request with an older session is recorded."""
    worker.clock.now += 86400
    older_texts = [await start_session(worker) for _ in range(MAX_SESSIONS_PER_ACCOUNT)]
    worker.clock.now -= 86400
    for text in older_texts[:2]:
        await use_session(worker, text)
    new_text = await start_session(worker)
    for text in (new_text, *older_texts[:2]):
        assert worker.access.login_sessions.verify(text)
    seen_by_id = {session.id: session.seen for session in worker.accounts.login_sessions(ALICE)}
    assert [seen_by_id[text.partition(".")[0]] for text in older_texts[:2]] == [worker.clock()] * 2


async def test_the_time_of_the_last_request_is_recorded(worker: AuthWorker) -> None:
    """The time of the last request is recorded at most once in ten minutes."""
    text, started = await start_session(worker), worker.clock()
    for later, recorded in (
        (USE_RECORD_SECONDS - 1, 0.0),
        (USE_RECORD_SECONDS, USE_RECORD_SECONDS),
        (USE_RECORD_SECONDS + 1, USE_RECORD_SECONDS),
    ):
        worker.clock.now = started + later
        await use_session(worker, text)
        (session,) = worker.accounts.login_sessions(ALICE)
        assert session.seen == started + recorded


async def test_sessions_and_tokens_are_not_interchangeable(worker: AuthWorker) -> None:
    """A session is not accepted as a bearer token or a password, and a token is not accepted as a session."""
    session = await start_session(worker)
    token = (await worker.access.bearer_tokens.issue(Identity(ALICE, version=1), {})).text
    api_token = (await worker.add_token(ALICE)).text
    assert worker.access.bearer_tokens.verify(token).name == ALICE
    for text in (token, api_token):
        check_refused(worker, text)
    for verify in (
        worker.access.credential_verifier.verify_bearer(session, KNOWN_ADDRESS),
        worker.access.credential_verifier.verify_basic(ALICE, session, KNOWN_ADDRESS),
        worker.access.credential_verifier.verify_api_token(session, KNOWN_ADDRESS),
    ):
        with pytest.raises(Unauthorized):
            await verify


@pytest.mark.full_store
async def test_invalid_sessions_are_refused(worker: AuthWorker, tmp_path: Path, clock: AuthClock) -> None:
    """A session of another store, a part of a session, and a session with another secret are refused."""
    text = await start_session(worker)
    session_id, _, secret = text.partition(".")
    async with auth_worker(tmp_path / "other", clock) as stranger:
        await stranger.add_user(AccountName("alice"))
        for wrong in (await start_session(stranger), "", "x", ".", session_id, f"{session_id}.", f".{secret}",
                      text + "0", f"{session_id}.{'0' * len(secret)}", text.upper(), "é" * 83,
                      "x" * 5000):  # fmt: skip
            check_refused(worker, wrong)
    assert worker.access.login_sessions.verify(text)


async def test_one_warning_on_a_full_disk(
    worker: AuthWorker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The disk is full, so that the use of a session cannot be recorded. The worker tries once, and not at each
    request."""

    async def refuse(*_: object) -> None:
        raise StorageFull

    monkeypatch.setattr(worker.accounts, "save_session_use", refuse)
    text = await start_session(worker)
    worker.clock.now += USE_RECORD_SECONDS
    for _ in range(10):
        worker.access.login_sessions.verify(text)
        await asyncio.sleep(0)
    await worker.access.login_sessions.aclose()  # waits until the running writes have ended
    assert [record.getMessage() for record in caplog.records] == [
        f"could not record the use of a login session: {StorageFull()}"
    ]
