"""Passwords as credentials: what they prove, how long they are cached, and what is logged of them."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import argon2
import bcrypt
import pytest

from registry.auth.audit_log import MAX_COLLECTED_ENTRIES, OVERFLOW_ACTION, REFUSALS_PER_SECOND, AuditBuffer
from registry.auth.password import hashing
from registry.auth.password.hashing import hash_password
from registry.auth.secret_cache import SecretCache
from storage.access import AccountName, AuditEntry, AuditQuery
from storage.content import Actor
from storage.errors import TooManyRequests, Unauthorized
from tests.fakes.auth_worker import (
    ADMIN,
    ALICE,
    AT_HOME,
    BOB,
    CI,
    ELSEWHERE,
    PASSWORD,
    AuthClock,
    AuthWorker,
    auth_worker,
)


async def refused(worker: AuthWorker, user: str, secret: str) -> None:
    with pytest.raises(Unauthorized) as error:
        await worker.access.credential_verifier.verify_basic(user, secret, AT_HOME)
    assert error.value.message == "the credentials are not valid"


@pytest.mark.slow
async def test_right_and_wrong(worker: AuthWorker) -> None:
    """The right password proves the account. No other text does."""
    proof = await worker.access.credential_verifier.verify_basic(ALICE, PASSWORD, AT_HOME)
    assert (proof.name, proof.robot, proof.version) == (ALICE, False, worker.accounts.account(ALICE).version)
    assert proof.access is None
    for wrong in ("", PASSWORD + " ", PASSWORD[:-1], PASSWORD.upper(), "x" * 2000, "x" * 20_000, "p\0q"):
        await refused(worker, ALICE, wrong)
    for nobody in ("", "Alice", "bob", "anonymous", "everyone", "alice ", "a" * 300, "älice", "../alice"):
        await refused(worker, nobody, PASSWORD)


@pytest.mark.slow
async def test_no_password(worker: AuthWorker) -> None:
    """A robot, and an account without a password, cannot log in with any password."""
    await worker.add_user(BOB, None)
    await worker.add_robot()
    for name in (BOB, CI):
        for secret in (PASSWORD, "None", "null", "*"):
            await refused(worker, name, secret)


async def test_unknown_costs_what_wrong_costs(worker: AuthWorker, hashed: list[bytes]) -> None:
    """A wrong password causes one hashing, whether the account exists or not, has no password, or is disabled."""
    await worker.add_user(BOB, None)
    off = AccountName("off")
    await worker.add_user(off)
    await worker.accounts.set_enabled(off, False, by=ADMIN)
    for name in (ALICE, BOB, off, "nobody"):
        hashed.clear()
        await refused(worker, name, "a wrong password")
        assert hashed == [b"a wrong password"]
    hashed.clear()
    await refused(worker, off, PASSWORD)
    assert hashed == [PASSWORD.encode()]
    assert worker.accounts.throttled_until(f"known off {AT_HOME.address}") == 0.0  # nobody has logged in from there


async def test_remembered(worker: AuthWorker, hashed: list[bytes]) -> None:
    """A password that comes with every request is hashed once an hour for each address. Another password does not use
    this cached result."""
    verify = worker.access.credential_verifier.verify_basic
    for _ in range(5):
        assert (await verify(ALICE, PASSWORD, AT_HOME)).name == ALICE
        assert (await verify(ALICE, PASSWORD, ELSEWHERE)).name == ALICE
    assert len(hashed) == 2
    await refused(worker, ALICE, PASSWORD + "!")
    await refused(worker, "alice:" + PASSWORD[:3], PASSWORD[3:])
    await refused(worker, "bob", PASSWORD)
    worker.clock.now += 3601
    assert await verify(ALICE, PASSWORD, AT_HOME)
    assert hashed.count(PASSWORD.encode()) == 4  # bob's too


@pytest.mark.slow
async def test_what_is_remembered_is_no_help_in_guessing(worker: AuthWorker) -> None:
    """A throttled guesser learns nothing from the right password, even while its owner logs in from another address."""
    verify = worker.access.credential_verifier.verify_basic
    assert await verify(ALICE, PASSWORD, AT_HOME)
    for number in range(10):
        with pytest.raises(Unauthorized):
            await verify(ALICE, f"guess number {number}", ELSEWHERE)
    for guess in ("one guess more", PASSWORD):
        with pytest.raises(TooManyRequests):
            await verify(ALICE, guess, ELSEWHERE)
    assert await verify(ALICE, PASSWORD, AT_HOME)


async def test_remembered_until_something_changes(worker: AuthWorker, data: Path, clock: AuthClock) -> None:
    """A new password, disabling and removal of the account end cached logins on every worker, even if the new password
    is the same as the old one."""
    async with auth_worker(data, clock) as other:
        verify = worker.access.credential_verifier.verify_basic
        assert await verify(ALICE, PASSWORD, AT_HOME)
        await other.accounts.set_password(ALICE, hash_password("another password"), by=ADMIN)
        await refused(worker, ALICE, PASSWORD)
        first = await verify(ALICE, "another password", AT_HOME)
        await other.accounts.set_enabled(ALICE, False, by=ADMIN)
        await refused(worker, ALICE, "another password")
        await other.accounts.set_enabled(ALICE, True, by=ADMIN)
        again = await verify(ALICE, "another password", AT_HOME)
        assert again.version != first.version
        await other.accounts.remove_account(ALICE, by=ADMIN)
        await refused(worker, ALICE, "another password")


async def test_unrelated_change_hashes_nothing(worker: AuthWorker, hashed: list[bytes]) -> None:
    """A change of another account's rights causes no hashing."""
    assert await worker.access.credential_verifier.verify_basic(ALICE, PASSWORD, AT_HOME)
    await worker.grant("everyone", "public/**", "pull")
    assert await worker.access.credential_verifier.verify_basic(ALICE, PASSWORD, AT_HOME)
    assert len(hashed) == 1


async def test_disabled_while_it_was_hashed(worker: AuthWorker) -> None:
    """An account that is disabled while its password is being checked is refused."""
    attempt = asyncio.create_task(worker.access.credential_verifier.verify_basic(ALICE, PASSWORD, AT_HOME))
    await asyncio.sleep(0)
    await worker.accounts.set_enabled(ALICE, False, by=ADMIN)
    with pytest.raises(Unauthorized):
        await attempt
    await refused(worker, ALICE, PASSWORD)


async def test_many_at_once_are_hashed_once(worker: AuthWorker, hashed: list[bytes]) -> None:
    """A hundred connections with one password cause one hashing, and all succeed. The same wrong password counts as one
    attempt."""
    verify = worker.access.credential_verifier.verify_basic
    proofs = await asyncio.gather(*(verify(ALICE, PASSWORD, AT_HOME) for _ in range(100)))
    assert {proof.name for proof in proofs} == {ALICE}
    wrong = (verify(ALICE, "a wrong password", ELSEWHERE) for _ in range(100))
    outcomes = await asyncio.gather(*wrong, return_exceptions=True)
    assert {type(each) for each in outcomes} == {Unauthorized}
    assert len(hashed) == 2


@pytest.mark.slow
async def test_crowd(worker: AuthWorker) -> None:
    """Many different passwords fill the queue, and the rest gets 429. Afterwards logins work as before."""
    verify = worker.access.credential_verifier.verify_basic
    many = [verify(f"user{n}", "password", Actor(address=f"10.0.{n // 200}.{n % 200}")) for n in range(90)]
    outcomes = await asyncio.gather(*many, return_exceptions=True)
    kinds = [type(each) for each in outcomes]
    assert kinds.count(TooManyRequests) == 90 - 66
    assert kinds.count(Unauthorized) == 66
    assert await verify(ALICE, PASSWORD, AT_HOME)


async def test_client_that_leaves(worker: AuthWorker) -> None:
    """A client that disconnects does not cancel the hashing for others with the same password."""
    verify = worker.access.credential_verifier.verify_basic
    first = asyncio.create_task(verify(ALICE, PASSWORD, AT_HOME))
    await asyncio.sleep(0)
    second = asyncio.create_task(verify(ALICE, PASSWORD, AT_HOME))
    await asyncio.sleep(0)
    first.cancel()
    assert (await second).name == ALICE
    assert first.cancelled()


async def test_hash_is_improved(worker: AuthWorker) -> None:
    """A password hash with weaker parameters is replaced at the next login. The session of that login stays valid."""
    weak = argon2.PasswordHasher(1, 8192, 1).hash(PASSWORD)
    await worker.accounts.set_password(ALICE, weak, by=ADMIN)
    proof = await worker.access.credential_verifier.verify_basic(ALICE, PASSWORD, AT_HOME)
    while worker.accounts.password_hash(ALICE) == weak:
        await worker.accounts.clear_failures([])  # a write that waits for those before it
    held = worker.accounts.password_hash(ALICE)
    assert held
    assert not hashing.needs_rehash(held)
    assert worker.access.revocation_check.check(proof) == proof
    worker.clock.now += 3601
    assert await worker.access.credential_verifier.verify_basic(ALICE, PASSWORD, AT_HOME) == proof


# The htpasswd file


def line(name: str, password: str) -> str:
    return f"{name}:{bcrypt.hashpw(password.encode(), bcrypt.gensalt(4)).decode()}\n"


def write(file: Path, text: str) -> None:
    file.write_text(text)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "htpasswd"
    path.write_text(line("carol", "carols password") + line("alice", "of the file"))
    return path


async def test_htpasswd(data: Path, clock: AuthClock, file: Path) -> None:
    """A password of a line in the htpasswd file logs in under the line's name. An account of the store has precedence
    over a line of the same name. If a line is removed or changed, or the store gets an account of its name, the next
    request is refused, also one with a bearer token."""
    async with auth_worker(data, clock, {"auth": {"htpasswd": str(file)}}) as worker:
        await worker.add_user(ALICE)
        verify = worker.access.credential_verifier.verify_basic
        bearer = worker.access.credential_verifier.verify_bearer
        assert await verify("alice", PASSWORD, AT_HOME)
        await refused(worker, "alice", "of the file")
        proof = await verify("carol", "carols password", AT_HOME)
        assert (proof.name, proof.version) == ("carol", None)
        assert proof.stamp
        text = (await worker.access.bearer_tokens.issue(proof, {})).text
        assert (await bearer(text, AT_HOME)).name == "carol"

        write(file, line("carol", "new password"))
        await refused(worker, "carol", "carols password")
        with pytest.raises(Unauthorized):
            await bearer(text, AT_HOME)
        assert await verify("carol", "new password", AT_HOME)

        write(file, line("dave", "daves password"))
        await refused(worker, "carol", "new password")
        assert await verify("dave", "daves password", AT_HOME)
        await worker.add_user(AccountName("dave"))
        await refused(worker, "dave", "daves password")
        assert await verify("dave", PASSWORD, AT_HOME)


async def test_disabled_account_is_not_found_in_the_file(data: Path, clock: AuthClock, file: Path) -> None:
    """A disabled account of the store cannot log in by a line of the file."""
    async with auth_worker(data, clock, {"auth": {"htpasswd": str(file)}}) as worker:
        await worker.add_user(ALICE)
        await worker.accounts.set_enabled(ALICE, False, by=ADMIN)
        await refused(worker, "alice", "of the file")
        await refused(worker, "alice", PASSWORD)


async def test_without_the_file_its_tokens_end(data: Path, clock: AuthClock, file: Path) -> None:
    """A server without the htpasswd file refuses tokens that were made for one of its lines."""
    async with auth_worker(data, clock, {"auth": {"htpasswd": str(file)}}) as worker:
        proof = await worker.access.credential_verifier.verify_basic("carol", "carols password", AT_HOME)
        text = (await worker.access.bearer_tokens.issue(proof, {})).text
    async with auth_worker(data, clock) as worker:
        with pytest.raises(Unauthorized):
            await worker.access.credential_verifier.verify_bearer(text, AT_HOME)


# The audit log


async def test_audit(worker: AuthWorker, caplog: pytest.LogCaptureFixture) -> None:
    """A login is recorded once an hour for each credential and address. Failures are recorded with their reason, and
    equal failures are counted. The log has no password, and no user name that cannot be an account's name."""
    verify = worker.access.credential_verifier.verify_basic
    by = Actor(address="192.0.2.1", request_id="one", user_agent="docker/29")
    with caplog.at_level(logging.DEBUG):
        for _ in range(3):
            await verify(ALICE, PASSWORD, by)
            with pytest.raises(Unauthorized):
                await verify(ALICE, "Secret Guess", by)
            with pytest.raises(Unauthorized):
                await verify("Secret Name", "password", by)
        await verify(ALICE, PASSWORD, ELSEWHERE)
        lines = await worker.audited()
    found = [(line.actor, line.target, line.outcome, line.address, line.count) for line in reversed(lines)]
    assert sorted(found) == [
        ("alice", "alice", "ok", "192.0.2.1", 1),
        ("alice", "alice", "ok", ELSEWHERE.address, 1),
        ("anonymous", "", "failed", "192.0.2.1", 3),
        ("anonymous", "alice", "failed", "192.0.2.1", 1),
        ("anonymous", "alice", "failed", "192.0.2.1", 2),
    ]
    reasons = {str((line.detail or {}).get("reason")) for line in lines if line.outcome == "failed"}
    assert reasons == {"the password is wrong", "the password is wrong, as before", "no account has such a name"}
    assert {line.user_agent for line in lines} == {"docker/29"}
    assert {line.request_id for line in lines if line.address == by.address} == {"one"}
    told = caplog.text + repr(lines)
    assert "Secret" not in told
    assert PASSWORD not in told


async def test_closing_waits_for_a_write_that_runs(worker: AuthWorker) -> None:
    """After the audit log is closed, each entry is in the store, at whatever point its write was."""
    for turns in range(8):
        buffer = AuditBuffer(worker.accounts, worker.clock, interval=0)
        buffer.record(AT_HOME, "login", f"turn-{turns}", "ok")
        for _ in range(turns):
            await asyncio.sleep(0)
        await buffer.aclose()
        lines = worker.accounts.audit(AuditQuery(), 100).items
        assert f"turn-{turns}" in {line.target for line in lines}


async def test_remembered_login_is_no_new_line(worker: AuthWorker) -> None:
    """A request with a cached credential is not recorded as a login."""
    await worker.access.credential_verifier.verify_basic(ALICE, PASSWORD, AT_HOME)
    assert len(await worker.audited()) == 1
    await worker.access.credential_verifier.verify_basic(ALICE, PASSWORD, AT_HOME)
    assert len(await worker.audited()) == 1


def entry(clock: AuthClock, **more: Any) -> AuditEntry:
    return AuditEntry(clock(), "anonymous", "login", **more)


async def test_notes_are_gathered(worker: AuthWorker, clock: AuthClock) -> None:
    """Lines of the audit log that differ only in their time become one line with a count. It is written after a moment,
    or when the process ends."""
    notes = AuditBuffer(worker.accounts, clock, interval=0.0)
    for _ in range(1000):
        clock.now += 0.001
        notes.add(entry(clock, address="192.0.2.9", detail={"reason": "x"}))
    notes.add(entry(clock, address="192.0.2.10"))
    query = AuditQuery(action="login")
    while not worker.accounts.audit(query, 10).items:
        await worker.accounts.clear_failures([])
    assert sorted(line.count for line in worker.accounts.audit(query, 10).items) == [1, 1000]
    patient = AuditBuffer(worker.accounts, clock, interval=3600.0)
    patient.add(entry(clock, address="192.0.2.11"))
    await patient.aclose()
    await patient.aclose()
    assert len(worker.accounts.audit(query, 10).items) == 3
    await notes.aclose()


async def test_notes_are_bounded(worker: AuthWorker, clock: AuthClock) -> None:
    """Above the bound, the log only records how many lines there were."""
    notes = AuditBuffer(worker.accounts, clock, interval=3600.0)
    for number in range(MAX_COLLECTED_ENTRIES + 50):
        notes.add(entry(clock, address=f"10.0.{number // 250}.{number % 250}"))
    await notes.aclose()
    page = worker.accounts.audit(AuditQuery(action="login"), 2 * MAX_COLLECTED_ENTRIES)
    assert len(page.items) == MAX_COLLECTED_ENTRIES
    [overflow] = worker.accounts.audit(AuditQuery(action=OVERFLOW_ACTION), 10).items
    assert overflow.count == 50


async def test_refusals_do_not_fill_the_disk(worker: AuthWorker, clock: AuthClock) -> None:
    """Failures under ever new names add a bounded number of lines a second, and logins are recorded all the same."""
    notes = AuditBuffer(worker.accounts, clock, interval=3600.0)
    for second in range(10):
        for number in range(MAX_COLLECTED_ENTRIES):
            notes.add(entry(clock, target=f"name{second}-{number}", outcome="failed"))
        await notes.flush()
        clock.now += 1.0
    notes.add(entry(clock, target="alice"))
    await notes.aclose()
    lines = worker.accounts.audit(AuditQuery(action="login"), 3 * MAX_COLLECTED_ENTRIES).items
    assert len(lines) == MAX_COLLECTED_ENTRIES + 9 * REFUSALS_PER_SECOND + 1
    assert lines[0].target == "alice"
    overflows = worker.accounts.audit(AuditQuery(action=OVERFLOW_ACTION), 100).items
    assert sum(line.count for line in overflows) == 9 * MAX_COLLECTED_ENTRIES - 9 * REFUSALS_PER_SECOND


# The cache of secrets


def test_kept_is_bounded() -> None:
    """`SecretCache` evicts the oldest entries. A value that replaces another one counts as the newest entry."""
    kept = SecretCache[int](max_entries=3)
    keys = [kept.key_of(str(number)) for number in range(5)]
    for number, key in enumerate(keys):
        kept.put(key, number)
    assert [kept.get(key) for key in keys] == [None, None, 2, 3, 4]
    for _ in range(20):
        kept.put(keys[2], 2)
    kept.put(keys[0], 0)
    assert [kept.get(key) for key in keys] == [0, None, 2, None, 4]
    kept.remove(keys[4])
    assert len(kept) == 2


def test_kept_keys_differ() -> None:
    """Different lists of secrets have different keys. Another process has another key for the same list."""
    kept = SecretCache[int]()
    lists = [("ab", "c"), ("a", "bc"), ("abc",), ("abc", ""), ("", "abc"), ("2:ab1:c",), ("a", "b", "c")]
    assert len({kept.key_of(*each) for each in lists}) == len(lists)
    assert kept.key_of("abc") == kept.key_of("abc") != SecretCache[int]().key_of("abc")
