"""`CredentialVerifier` checks user names and passwords. The tests check which are accepted, how long a result is
cached, and what is logged."""

from __future__ import annotations

import asyncio
import logging
import threading
from pathlib import Path
from typing import Any

import argon2
import bcrypt
import pytest

from registry.auth.audit_log import MAX_COLLECTED_ENTRIES, OVERFLOW_ACTION, REFUSALS_PER_SECOND, AuditBuffer
from registry.auth.password import hashing, password_check
from registry.auth.password.hashing import PasswordComparison, StoredHash, compare_password, hash_password
from registry.auth.rights.principal import Identity
from registry.auth.secret_cache import SecretCache
from storage.access import AccountName, AuditEntry, AuditQuery
from storage.content import Actor
from storage.errors import TooManyRequests, Unauthorized
from tests.fakes.auth_worker import (
    ADMIN,
    ALICE,
    BOB,
    CI,
    KNOWN_ADDRESS,
    OTHER_ADDRESS,
    PASSWORD,
    AuthClock,
    AuthWorker,
    auth_worker,
)


async def check_refused(worker: AuthWorker, user: str, secret: str) -> None:
    """Checks that a login with this user name and password is refused with the usual error text."""
    with pytest.raises(Unauthorized) as error:
        await worker.access.credential_verifier.verify_basic(user, secret, KNOWN_ADDRESS)
    assert error.value.message == "the credentials are not valid"


@pytest.mark.slow
async def test_only_the_right_password_is_accepted(worker: AuthWorker) -> None:
    """The right password logs in to its account. No other text does."""
    identity = await worker.access.credential_verifier.verify_basic(ALICE, PASSWORD, KNOWN_ADDRESS)
    assert (identity.name, identity.robot, identity.version) == (ALICE, False, worker.accounts.account(ALICE).version)
    assert identity.access is None
    for wrong in ("", PASSWORD + " ", PASSWORD[:-1], PASSWORD.upper(), "x" * 2000, "x" * 20_000, "p\0q"):
        await check_refused(worker, ALICE, wrong)
    for name in ("", "Alice", "bob", "anonymous", "everyone", "alice ", "a" * 300, "älice", "../alice"):
        await check_refused(worker, name, PASSWORD)


@pytest.mark.slow
async def test_accounts_without_a_password_cannot_log_in_with_one(worker: AuthWorker) -> None:
    """A robot, and an account without a password, cannot log in with any password."""
    await worker.add_user(BOB, None)
    await worker.add_robot()
    for name in (BOB, CI):
        for secret in (PASSWORD, "None", "null", "*"):
            await check_refused(worker, name, secret)


async def test_a_wrong_password_costs_one_hashing_for_every_account(worker: AuthWorker, hashed: list[bytes]) -> None:
    """A wrong password is hashed once, whether the account exists or not, has no password, or is disabled. The right
    password of a disabled account is refused like a wrong one."""
    await worker.add_user(BOB, None)
    disabled = AccountName("off")
    await worker.add_user(disabled)
    await worker.accounts.set_enabled(disabled, False, by=ADMIN)
    for name in (ALICE, BOB, disabled, "nobody"):
        hashed.clear()
        await check_refused(worker, name, "a wrong password")
        assert hashed == [b"a wrong password"]
    hashed.clear()
    await check_refused(worker, disabled, PASSWORD)
    assert hashed == [PASSWORD.encode()]
    # This was no login: after one, the store has under this key the time until which the address is familiar.
    assert worker.accounts.throttled_until(f"known off {KNOWN_ADDRESS.address}") == 0.0


async def test_a_password_is_hashed_once_an_hour(worker: AuthWorker, hashed: list[bytes]) -> None:
    """If the same password is sent with every request, it is hashed once an hour, from however many addresses it comes.
    Other names or passwords do not use this cached result."""
    verify = worker.access.credential_verifier.verify_basic
    for _ in range(5):
        assert (await verify(ALICE, PASSWORD, KNOWN_ADDRESS)).name == ALICE
        assert (await verify(ALICE, PASSWORD, OTHER_ADDRESS)).name == ALICE
    assert len(hashed) == 1
    await check_refused(worker, ALICE, PASSWORD + "!")
    await check_refused(worker, "alice:" + PASSWORD[:3], PASSWORD[3:])
    await check_refused(worker, "bob", PASSWORD)
    worker.clock.now += 3601
    assert await verify(ALICE, PASSWORD, KNOWN_ADDRESS)
    assert hashed.count(PASSWORD.encode()) == 3  # twice for alice and once for bob


@pytest.mark.slow
async def test_a_cached_password_does_not_help_in_guessing(worker: AuthWorker) -> None:
    """A client that guessed too often gets 429 even for the right password, although the owner's login from another
    address is cached."""
    verify = worker.access.credential_verifier.verify_basic
    assert await verify(ALICE, PASSWORD, KNOWN_ADDRESS)
    for number in range(10):
        with pytest.raises(Unauthorized):
            await verify(ALICE, f"guess number {number}", OTHER_ADDRESS)
    for guess in ("one guess more", PASSWORD):
        with pytest.raises(TooManyRequests):
            await verify(ALICE, guess, OTHER_ADDRESS)
    assert await verify(ALICE, PASSWORD, KNOWN_ADDRESS)


@pytest.mark.slow
async def test_cached_logins_end_when_the_account_changes(worker: AuthWorker, data: Path, clock: AuthClock) -> None:
    """When an account gets a new password, is disabled or is removed, its cached logins are no longer valid on any
    worker. Disabling and enabling an account changes its version, which each login's identity contains."""
    async with auth_worker(data, clock) as other:
        verify = worker.access.credential_verifier.verify_basic
        assert await verify(ALICE, PASSWORD, KNOWN_ADDRESS)
        await other.accounts.set_password(ALICE, hash_password("another password"), by=ADMIN)
        await check_refused(worker, ALICE, PASSWORD)
        first = await verify(ALICE, "another password", KNOWN_ADDRESS)
        await other.accounts.set_enabled(ALICE, False, by=ADMIN)
        await check_refused(worker, ALICE, "another password")
        await other.accounts.set_enabled(ALICE, True, by=ADMIN)
        later = await verify(ALICE, "another password", KNOWN_ADDRESS)
        assert later.version != first.version
        await other.accounts.remove_account(ALICE, by=ADMIN)
        await check_refused(worker, ALICE, "another password")


async def test_an_unrelated_change_causes_no_hashing(worker: AuthWorker, hashed: list[bytes]) -> None:
    """A change of another account's rights causes no hashing."""
    assert await worker.access.credential_verifier.verify_basic(ALICE, PASSWORD, KNOWN_ADDRESS)
    await worker.grant("everyone", "public/**", "pull")
    assert await worker.access.credential_verifier.verify_basic(ALICE, PASSWORD, KNOWN_ADDRESS)
    assert len(hashed) == 1


async def test_an_account_that_is_disabled_during_hashing_is_refused(
    worker: AuthWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An account that is disabled while its password is being checked is refused."""
    started, finish = threading.Event(), threading.Event()

    def compare(password: str, stored: StoredHash) -> PasswordComparison:
        started.set()
        finish.wait(30)
        return compare_password(password, stored)

    monkeypatch.setattr(password_check, "compare_password", compare)
    attempt = asyncio.create_task(worker.access.credential_verifier.verify_basic(ALICE, PASSWORD, KNOWN_ADDRESS))
    assert await asyncio.to_thread(started.wait, 30)
    await worker.accounts.set_enabled(ALICE, False, by=ADMIN)
    finish.set()
    with pytest.raises(Unauthorized):
        await attempt
    await check_refused(worker, ALICE, PASSWORD)


async def test_equal_passwords_are_hashed_once(worker: AuthWorker, hashed: list[bytes]) -> None:
    """A hundred concurrent logins with the same password cause one hashing, and all succeed. A hundred with the same
    wrong password also cause one hashing."""
    verify = worker.access.credential_verifier.verify_basic
    identities = await asyncio.gather(*(verify(ALICE, PASSWORD, KNOWN_ADDRESS) for _ in range(100)))
    assert {identity.name for identity in identities} == {ALICE}
    wrong = (verify(ALICE, "a wrong password", OTHER_ADDRESS) for _ in range(100))
    outcomes = await asyncio.gather(*wrong, return_exceptions=True)
    assert {type(each) for each in outcomes} == {Unauthorized}
    assert len(hashed) == 2


@pytest.mark.slow
async def test_logins_beyond_the_queue_get_429(worker: AuthWorker) -> None:
    """Many logins with different names from different sites fill the queue for hashing, and the rest gets 429.
    Afterwards logins work as before."""
    verify = worker.access.credential_verifier.verify_basic
    attempts = [verify(f"user{n}", "password", Actor(address=f"10.0.{n}.1")) for n in range(90)]
    outcomes = await asyncio.gather(*attempts, return_exceptions=True)
    kinds = [type(each) for each in outcomes]
    assert kinds.count(TooManyRequests) == 90 - 74  # 64 logins wait in all places, 8 in reserved ones, 2 are hashed
    assert kinds.count(Unauthorized) == 74
    assert await verify(ALICE, PASSWORD, KNOWN_ADDRESS)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["2001:db8:0:{:x}::1", "203.0.113.{}"])
async def test_one_site_cannot_keep_others_from_logging_in(worker: AuthWorker, pattern: str) -> None:
    """A client that has a network of 2^80 IPv6 addresses, or 256 IPv4 addresses, and logs in from many of them with
    different names, cannot take the reserved places. A login from elsewhere is accepted at the same time. From that
    network, right and wrong passwords are refused alike, and for every name."""
    verify = worker.access.credential_verifier.verify_basic
    attempts = [verify(f"user{n}", "password", Actor(address=pattern.format(n))) for n in range(90)]
    insiders = [verify(name, PASSWORD, Actor(address=pattern.format(99))) for name in (ALICE, "nobody")]
    outcomes = await asyncio.gather(
        *attempts, *insiders, verify(ALICE, PASSWORD, KNOWN_ADDRESS), return_exceptions=True
    )
    kinds = [type(each) for each in outcomes]
    assert kinds[-3:] == [TooManyRequests, TooManyRequests, Identity]
    assert kinds.count(Unauthorized) == 66  # 64 logins wait, and 2 are hashed


async def test_a_disconnected_client_does_not_cancel_the_hashing(worker: AuthWorker) -> None:
    """If a client disconnects, the hashing continues for other clients with the same password."""
    verify = worker.access.credential_verifier.verify_basic
    first = asyncio.create_task(verify(ALICE, PASSWORD, KNOWN_ADDRESS))
    await asyncio.sleep(0)
    second = asyncio.create_task(verify(ALICE, PASSWORD, KNOWN_ADDRESS))
    await asyncio.sleep(0)
    first.cancel()
    assert (await second).name == ALICE
    assert first.cancelled()


async def test_a_weak_hash_is_replaced(worker: AuthWorker) -> None:
    """A password hash with weaker parameters is replaced at the next login. The identity of that login stays valid."""
    weak = argon2.PasswordHasher(1, 8192, 1).hash(PASSWORD)
    await worker.accounts.set_password(ALICE, weak, by=ADMIN)
    identity = await worker.access.credential_verifier.verify_basic(ALICE, PASSWORD, KNOWN_ADDRESS)
    while worker.accounts.password_hash(ALICE) == weak:
        await worker.accounts.clear_failures([])  # an empty write, which waits for all earlier writes
    stored_hash = worker.accounts.password_hash(ALICE)
    assert stored_hash
    assert not hashing.needs_rehash(stored_hash)
    assert worker.access.revocation_check.check(identity) == identity
    worker.clock.now += 3601
    assert await worker.access.credential_verifier.verify_basic(ALICE, PASSWORD, KNOWN_ADDRESS) == identity


# The htpasswd file


def htpasswd_line(name: str, password: str) -> str:
    """Returns a line of an htpasswd file."""
    return f"{name}:{bcrypt.hashpw(password.encode(), bcrypt.gensalt(4)).decode()}\n"


def write(path: Path, text: str) -> None:
    path.write_text(text)


@pytest.fixture
def htpasswd_file(tmp_path: Path) -> Path:
    """Writes an htpasswd file with lines for carol and alice, and returns its path."""
    path = tmp_path / "htpasswd"
    path.write_text(htpasswd_line("carol", "carols password") + htpasswd_line("alice", "alices file password"))
    return path


async def test_logins_by_the_htpasswd_file(data: Path, clock: AuthClock, htpasswd_file: Path) -> None:
    """A person can log in with the name and password of a line in the htpasswd file. An account of the store has
    precedence over a line of the same name. If a line is removed or changed, or the store gets an account of its name,
    the next request is refused. This holds for the password and for bearer tokens."""
    async with auth_worker(data, clock, {"auth": {"htpasswd": str(htpasswd_file)}}) as worker:
        await worker.add_user(ALICE)
        verify = worker.access.credential_verifier.verify_basic
        bearer = worker.access.credential_verifier.verify_bearer
        assert await verify("alice", PASSWORD, KNOWN_ADDRESS)
        await check_refused(worker, "alice", "alices file password")
        identity = await verify("carol", "carols password", KNOWN_ADDRESS)
        assert (identity.name, identity.version) == ("carol", None)
        assert identity.stamp
        text = (await worker.access.bearer_tokens.issue(identity, {})).text
        assert (await bearer(text, KNOWN_ADDRESS)).name == "carol"

        write(htpasswd_file, htpasswd_line("carol", "new password"))
        await check_refused(worker, "carol", "carols password")
        with pytest.raises(Unauthorized):
            await bearer(text, KNOWN_ADDRESS)
        assert await verify("carol", "new password", KNOWN_ADDRESS)

        write(htpasswd_file, htpasswd_line("dave", "daves password"))
        await check_refused(worker, "carol", "new password")
        assert await verify("dave", "daves password", KNOWN_ADDRESS)
        await worker.add_user(AccountName("dave"))
        await check_refused(worker, "dave", "daves password")
        assert await verify("dave", PASSWORD, KNOWN_ADDRESS)


async def test_a_disabled_account_cannot_log_in_by_the_file(data: Path, clock: AuthClock, htpasswd_file: Path) -> None:
    """A disabled account of the store cannot log in by a line of the file."""
    async with auth_worker(data, clock, {"auth": {"htpasswd": str(htpasswd_file)}}) as worker:
        await worker.add_user(ALICE)
        await worker.accounts.set_enabled(ALICE, False, by=ADMIN)
        await check_refused(worker, "alice", "alices file password")
        await check_refused(worker, "alice", PASSWORD)


async def test_without_the_file_its_tokens_are_refused(data: Path, clock: AuthClock, htpasswd_file: Path) -> None:
    """If the server no longer has the htpasswd file, it refuses bearer tokens that were issued for a line of the
    file."""
    async with auth_worker(data, clock, {"auth": {"htpasswd": str(htpasswd_file)}}) as worker:
        identity = await worker.access.credential_verifier.verify_basic("carol", "carols password", KNOWN_ADDRESS)
        text = (await worker.access.bearer_tokens.issue(identity, {})).text
    async with auth_worker(data, clock) as worker:
        with pytest.raises(Unauthorized):
            await worker.access.credential_verifier.verify_bearer(text, KNOWN_ADDRESS)


# The audit log


async def test_logins_in_the_audit_log(worker: AuthWorker, caplog: pytest.LogCaptureFixture) -> None:
    """A login is recorded once an hour for each credential and address. A failed login is recorded with its reason;
    equal failures become one entry with a count. Passwords, and user names that no account can have, are not logged:
    such a name may be a password in the wrong field."""
    verify = worker.access.credential_verifier.verify_basic
    worker.access.audit_buffer._interval = 3600.0  # only `audited` writes the entries, however slow the machine is
    by = Actor(address="192.0.2.1", request_id="one", user_agent="docker/29")
    with caplog.at_level(logging.DEBUG):
        for _ in range(3):
            await verify(ALICE, PASSWORD, by)
            with pytest.raises(Unauthorized):
                await verify(ALICE, "Secret Guess", by)
            with pytest.raises(Unauthorized):
                await verify("Secret Name", "password", by)
        await verify(ALICE, PASSWORD, OTHER_ADDRESS)
        lines = await worker.audited()
    recorded = [(line.actor, line.target, line.outcome, line.address, line.count) for line in reversed(lines)]
    assert sorted(recorded) == [
        ("alice", "alice", "ok", "192.0.2.1", 1),
        ("alice", "alice", "ok", OTHER_ADDRESS.address, 1),
        ("anonymous", "", "failed", "192.0.2.1", 3),
        ("anonymous", "alice", "failed", "192.0.2.1", 1),
        ("anonymous", "alice", "failed", "192.0.2.1", 2),
    ]
    reasons = {str((line.detail or {}).get("reason")) for line in lines if line.outcome == "failed"}
    # "as before": the same wrong password came again from the same address, so it was not hashed again.
    assert reasons == {"the password is wrong", "the password is wrong, as before", "no account has such a name"}
    assert {line.user_agent for line in lines} == {"docker/29"}
    assert {line.request_id for line in lines if line.address == by.address} == {"one"}
    logged_text = caplog.text + repr(lines)
    assert "Secret" not in logged_text
    assert PASSWORD not in logged_text


async def test_logins_are_recorded_after_the_clock_was_set_back(worker: AuthWorker) -> None:
    """A login with an API token was recorded while the clock was a day ahead. After the clock was set back, the next
    login is recorded, and so is the time at which the token was last used."""
    api_token = await worker.add_token(ALICE)
    for seconds in (86400, -86400):
        worker.clock.now += seconds
        await worker.access.credential_verifier.verify_api_token(api_token.text, KNOWN_ADDRESS)
        # The verifier has started a task that writes the time of use to the store. While the first empty write below
        # is running, the task starts its write. The second empty write waits for the task's write.
        for _ in range(2):
            await worker.accounts.clear_failures([])
        assert worker.accounts.token(api_token.token.id)[0].used == worker.clock()
    assert sum(line.count for line in await worker.audited()) == 2


async def test_closing_waits_for_a_write_that_runs(worker: AuthWorker) -> None:
    """When `aclose` returns, the entry is in the store, however far its write was when `aclose` was called."""
    for turns in range(8):  # turns of the event loop before `aclose` is called
        buffer = AuditBuffer(worker.accounts, worker.clock, interval=0)
        buffer.record(KNOWN_ADDRESS, "login", f"turn-{turns}", "ok")
        for _ in range(turns):
            await asyncio.sleep(0)
        await buffer.aclose()
        lines = worker.accounts.audit(AuditQuery(), 100).items
        assert f"turn-{turns}" in {line.target for line in lines}


async def test_a_cached_login_is_not_recorded(worker: AuthWorker) -> None:
    """A request with a cached credential is not recorded as a login."""
    await worker.access.credential_verifier.verify_basic(ALICE, PASSWORD, KNOWN_ADDRESS)
    assert len(await worker.audited()) == 1
    await worker.access.credential_verifier.verify_basic(ALICE, PASSWORD, KNOWN_ADDRESS)
    assert len(await worker.audited()) == 1


def login_entry(clock: AuthClock, **fields: Any) -> AuditEntry:
    return AuditEntry(clock(), "anonymous", "login", **fields)


async def test_equal_audit_entries_are_counted(worker: AuthWorker, clock: AuthClock) -> None:
    """Entries of the audit log that differ only in their time become one entry with a count. `AuditBuffer` writes it
    after its interval, or when the buffer is closed."""
    buffer = AuditBuffer(worker.accounts, clock, interval=0.0)
    for _ in range(1000):
        clock.now += 0.001
        buffer.add(login_entry(clock, address="192.0.2.9", detail={"reason": "x"}))
    buffer.add(login_entry(clock, address="192.0.2.10"))
    query = AuditQuery(action="login")
    while not worker.accounts.audit(query, 10).items:
        await worker.accounts.clear_failures([])  # an empty write, which gives the buffer the time to write
    assert sorted(line.count for line in worker.accounts.audit(query, 10).items) == [1, 1000]
    slow_buffer = AuditBuffer(worker.accounts, clock, interval=3600.0)
    slow_buffer.add(login_entry(clock, address="192.0.2.11"))
    await slow_buffer.aclose()
    await slow_buffer.aclose()
    assert len(worker.accounts.audit(query, 10).items) == 3
    await buffer.aclose()


async def test_the_audit_buffer_has_a_largest_size(worker: AuthWorker, clock: AuthClock) -> None:
    """Of the entries between two writes, the audit log records the first `MAX_COLLECTED_ENTRIES`. Of the others, it
    records only their number."""
    buffer = AuditBuffer(worker.accounts, clock, interval=3600.0)
    for number in range(MAX_COLLECTED_ENTRIES + 50):
        buffer.add(login_entry(clock, address=f"10.0.{number // 250}.{number % 250}"))
    await buffer.aclose()
    page = worker.accounts.audit(AuditQuery(action="login"), 2 * MAX_COLLECTED_ENTRIES)
    assert len(page.items) == MAX_COLLECTED_ENTRIES
    [overflow] = worker.accounts.audit(AuditQuery(action=OVERFLOW_ACTION), 10).items
    assert overflow.count == 50


async def test_failed_logins_are_recorded_at_a_limited_rate(worker: AuthWorker, clock: AuthClock) -> None:
    """If every failed login has a new name, the first `MAX_COLLECTED_ENTRIES` failures are recorded, and then
    `REFUSALS_PER_SECOND` a second. Of the others, only their number is recorded. A successful login is still
    recorded."""
    buffer = AuditBuffer(worker.accounts, clock, interval=3600.0)
    for second in range(10):
        for number in range(MAX_COLLECTED_ENTRIES):
            buffer.add(login_entry(clock, target=f"name{second}-{number}", outcome="failed"))
        await buffer.flush()
        clock.now += 1.0
    buffer.add(login_entry(clock, target="alice"))
    await buffer.aclose()
    lines = worker.accounts.audit(AuditQuery(action="login"), 3 * MAX_COLLECTED_ENTRIES).items
    assert len(lines) == MAX_COLLECTED_ENTRIES + 9 * REFUSALS_PER_SECOND + 1
    assert lines[0].target == "alice"
    overflows = worker.accounts.audit(AuditQuery(action=OVERFLOW_ACTION), 100).items
    assert sum(line.count for line in overflows) == 9 * MAX_COLLECTED_ENTRIES - 9 * REFUSALS_PER_SECOND


# The cache of secrets


def test_the_secret_cache_evicts_the_oldest_entries() -> None:
    """`SecretCache` evicts the oldest entries. An entry that is put again counts as the newest."""
    cache = SecretCache[int](max_entries=3)
    keys = [cache.key_of(str(number)) for number in range(5)]
    for number, key in enumerate(keys):
        cache.put(key, number)
    assert [cache.get(key) for key in keys] == [None, None, 2, 3, 4]
    for _ in range(20):
        cache.put(keys[2], 2)
    cache.put(keys[0], 0)
    assert [cache.get(key) for key in keys] == [0, None, 2, None, 4]
    cache.remove(keys[4])
    assert len(cache) == 2


def test_keys_of_the_secret_cache_differ() -> None:
    """Different lists of secrets have different keys. For the same list, another cache (as in another process) has
    another key."""
    cache = SecretCache[int]()
    lists = [("ab", "c"), ("a", "bc"), ("abc",), ("abc", ""), ("", "abc"), ("2:ab1:c",), ("a", "b", "c")]
    assert len({cache.key_of(*each) for each in lists}) == len(lists)
    assert cache.key_of("abc") == cache.key_of("abc") != SecretCache[int]().key_of("abc")
