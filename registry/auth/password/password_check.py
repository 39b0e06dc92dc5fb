"""Checks passwords of accounts in the store and in the htpasswd file. If both have an account of the same name, the
account in the store is used.

Each process hashes a right password only once an hour, even if many addresses send it. A wrong password is hashed, and
counted as a failure, separately for each network that sends it.

Failed logins are throttled. Neither the result of a check nor its duration reveals which accounts exist.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from registry.auth.password.hashing import (
    MAX_PASSWORD_BYTES,
    SALT_BYTES,
    HashingPool,
    PasswordComparison,
    StoredHash,
    compare_password,
    hash_password,
    needs_rehash,
)
from registry.auth.password.htpasswd import EMPTY_CONTENT, HtpasswdContent, HtpasswdFile
from registry.auth.password.throttle import LoginThrottle
from registry.auth.password.wrong_passwords import WrongPasswords
from registry.auth.rights.principal import Identity
from registry.auth.secret_cache import SecretCache
from registry.client_addresses import network_of, site_of
from registry.single_flight import cancel_and_wait, start_detached, wait_for_outcome
from storage.access import AccountKind, AccountName, AccountUnknown
from storage.accounts import Accounts
from storage.errors import RegistryError, Unauthorized

log = logging.getLogger(__name__)

WRONG_CACHED_SECONDS: Final = 86400.0
"""Seconds for which a wrong password is cached. If the same network sends the password again in this time, the check
refuses it without hashing. The time is long because docker sends its login for Docker Hub to every mirror of Docker
Hub, again and again."""
RIGHT_CACHED_SECONDS: Final = 3600.0
"""Seconds for which a right password is cached. In this time, the check accepts the password from every address without
hashing."""

_AccountState = tuple[StoredHash, Identity | None]
"""The hash of an account's password, and the identity that the right password proves. The identity is None if no
password is right: the account does not exist, is disabled, or has no password."""


@dataclass(slots=True)
class _WrongPasswordEntry:
    """The cache entry of a wrong password. The cache key is a hash of the account's name, the password and the client's
    network (an IPv4 address, or an IPv6 network of 64 bits).

    - `checked_against`: the stored hash with which the password was compared, and the account's identity at that time.
      The entry is valid until the hash or the identity changes.
    - `epoch`: the store's epoch (a number that every change of an account increases) at the last check that found the
      entry valid.
    - `file_version`: the version of the htpasswd file at the same check.
    - `until`: when the entry expires, in seconds since 1970.
    """

    checked_against: _AccountState
    epoch: int
    file_version: str
    until: float


@dataclass(frozen=True, slots=True)
class _RightPasswordEntry:
    """The cache entry of a right password. The cache key is a hash of the account's name and the password.

    - `checked_against`: the stored hash that the password matched, and the account's identity at that time. The entry
      is valid until the hash or the identity changes.
    - `until`: when the entry expires, in seconds since 1970.
    """

    checked_against: _AccountState
    until: float


class PasswordCheck:
    """Checks passwords, for one process and its event loop. `clock` returns seconds since 1970."""

    def __init__(
        self,
        accounts: Accounts,
        hashing: HashingPool,
        throttle: LoginThrottle,
        clock: Callable[[], float],
        htpasswd: HtpasswdFile | None = None,
    ) -> None:
        self._accounts = accounts
        self._pool = hashing
        self._throttle = throttle
        self._clock = clock
        self._htpasswd = htpasswd
        # If a `StoredHash` has no argon2 hash, the password is hashed with a *dummy salt*, so that the check takes as
        # long as for other accounts. The salt is computed with this key. The key differs between stores, so that nobody
        # can prepare hashes that fit many stores.
        self._salt_key = hashlib.blake2b(accounts.instance_id().encode()).digest()
        self._wrong_cache = SecretCache[_WrongPasswordEntry]()
        self._right_cache = SecretCache[_RightPasswordEntry]()
        self._wrong_passwords = WrongPasswords(accounts, clock)
        self._comparisons: dict[tuple[bytes, StoredHash, Identity | None], asyncio.Task[PasswordComparison]] = {}
        """The running tasks that compare a password with a stored hash. The key consists of the password's cache key in
        `_right_cache` and the account's state."""
        self._rehashes: dict[str, asyncio.Task[None]] = {}
        """The running tasks that replace a hash whose parameters are outdated, by the old hash."""

    async def check(self, name: AccountName, password: str, address: str) -> Identity:
        """Checks the password of an account, and returns the account's identity. `address`: the client's IP address.

        - Raises Unauthorized if the password is wrong. The text of the error is only for the audit log. The caller must
          send the client the same text in all cases.
        - Raises TooManyRequests after too many failures, or if too many logins wait for hashing.
        - Raises StorageFull or StorageFailed if the store cannot count a failure.

        If the account does not exist, is disabled or has no password, every password is wrong, and the check takes as
        long as for other accounts. If a client repeats a wrong password, all workers together count one failure a day.
        """
        if len(password.encode()) > MAX_PASSWORD_BYTES:
            raise Unauthorized("the password is too long")
        key = self._wrong_cache.key_of(name, password, network_of(address))
        file = await self._htpasswd.read_current() if self._htpasswd else EMPTY_CONTENT
        if self._is_cached_as_wrong(key, name, file):
            raise Unauthorized("the password is wrong, as before")
        self._throttle.check(name, address)
        epoch = self._accounts.epoch()
        stored_hash, identity = account_state = self._account_state(name, file)
        comparison, has_started_hashing = await self._compare(name, password, account_state, site_of(address))
        if not comparison.is_right or identity is None:
            # `comparison.digest` is a hash of the wrong password. It is empty if the hashing has failed, or if the
            # stored hash is malformed. The password may then be right, so it is not cached as wrong.
            if comparison.digest:
                until = self._clock() + WRONG_CACHED_SECONDS
                self._wrong_cache.put(key, _WrongPasswordEntry(account_state, epoch, file.version, until))
            if await self._wrong_passwords.counts_as_failure(name, address, identity, comparison.digest):
                # Concurrent logins with the same password share one hashing, and count as one failure for the account.
                # Otherwise many machines with an old password would block the account for hours.
                await self._throttle.record_failure(
                    *(name, address),
                    counts_for_account=has_started_hashing,
                    counts_for_address=not self._has_only_unusable_line(name, file),
                )
            # The client sees neither text, so it cannot tell whether the account exists.
            raise Unauthorized("the password is wrong" if identity else "there is no such account with a password")
        await self._throttle.record_success(name, address)
        if stored_hash.argon2 is not None and needs_rehash(stored_hash.argon2):
            self._start_rehash(name, stored_hash.argon2, password)
        return identity

    def _has_only_unusable_line(self, name: AccountName, file: HtpasswdContent) -> bool:
        """Returns whether the store lacks the account `name`, and the htpasswd file cannot be read or has only invalid
        lines for it. Every password of the account is then refused, even the right one.

        Failed logins to this account do not count for the client's address, because no guess can succeed. But they
        count for the account, as for an account in the store. Otherwise, a client would notice that this account is
        not throttled, and would learn that the store does not have it."""
        return self._htpasswd is not None and file.may_have_unusable_line(name) and not self._is_in_store(name)

    def _is_in_store(self, name: AccountName) -> bool:
        try:
            self._accounts.account(name)
        except AccountUnknown:
            return False
        return True

    async def aclose(self) -> None:
        """Cancels the hashings that have not begun, and waits until the running hashings and the replacements of
        hashes have ended."""
        await cancel_and_wait(self._comparisons.values())
        await asyncio.gather(*self._rehashes.values(), return_exceptions=True)

    def _is_cached_as_wrong(self, key: bytes, name: AccountName, file: HtpasswdContent) -> bool:
        """Returns whether the cache has a wrong password under `key`, and the account `name` has not changed since the
        password was checked. `file`: the content of the htpasswd file. Reads the account only if the store or the
        htpasswd file has changed."""
        entry = self._wrong_cache.get(key)
        if entry is None:
            return False
        if self._clock() < entry.until:
            epoch = self._accounts.epoch()
            is_unchanged = (entry.epoch, entry.file_version) == (epoch, file.version)
            if is_unchanged or entry.checked_against == self._account_state(name, file):
                entry.epoch, entry.file_version = epoch, file.version
                return True
        self._wrong_cache.remove(key)
        return False

    async def _compare(
        self, name: AccountName, password: str, account_state: _AccountState, site: str
    ) -> tuple[PasswordComparison, bool]:
        """Compares the password of the account `name` with the hash in `account_state`. If another request already
        hashes the same password, waits for the result of that hashing. Returns the result, and whether this call has
        started a hashing. `site`: the client's network as `site_of` returns it, by which the queue of hashings counts
        logins. Raises TooManyRequests if too many logins wait for hashing."""
        # While the queue is full for this site, even a password in `_right_cache` gets 429. Otherwise a client could
        # fill the queue and then guess passwords. A wrong guess would get 429, which does not count as a failure. A
        # right guess would be accepted from the cache, so the client would find the password without being throttled.
        self._pool.check_queue(site)
        key = self._right_cache.key_of(name, password)
        entry = self._right_cache.get(key)
        if entry is not None:
            if entry.checked_against == account_state and self._clock() < entry.until:
                return PasswordComparison(True), False
            self._right_cache.remove(key)
        has_started_hashing = (key, *account_state) not in self._comparisons
        comparison = await wait_for_outcome(self._comparison_task(key, password, account_state, site))
        if comparison.is_right:
            self._right_cache.put(key, _RightPasswordEntry(account_state, self._clock() + RIGHT_CACHED_SECONDS))
        return comparison, has_started_hashing

    def _comparison_task(
        self, key: bytes, password: str, account_state: _AccountState, site: str
    ) -> asyncio.Task[PasswordComparison]:
        """Returns the task that compares the password with the hash in `account_state`. Starts the task if it does
        not run yet. `key` is the cache key of `_right_cache`."""
        # The key contains `account_state`, so that a login after a change of the account starts a new comparison.
        task_key = (key, *account_state)
        task = self._comparisons.get(task_key)
        if task is None:
            work = partial(compare_password, password, account_state[0])
            task = self._comparisons[task_key] = self._pool.start(work, site)
            task.add_done_callback(lambda _: self._comparisons.pop(task_key, None))
        return task

    def _account_state(self, name: AccountName, file: HtpasswdContent) -> _AccountState:
        """Returns the state of the account `name`. `file`: the content of the htpasswd file."""
        dummy_salt = hashlib.blake2b(name.encode(), digest_size=SALT_BYTES, key=self._salt_key).digest()
        # No password matches `no_hash`. It has the highest bcrypt cost and a dummy salt, so that a wrong password takes
        # the same time for all accounts, even for accounts that do not exist.
        no_hash = StoredHash(highest_bcrypt_cost=file.highest_bcrypt_cost, dummy_salt=dummy_salt)
        try:
            account = self._accounts.account(name)
        except AccountUnknown:
            line = file.lines.get(name)
            if line is None:
                return no_hash, None
            # When the line changes, its stamp (a hash of the line) changes, and an identity with the old stamp is
            # refused.
            identity = Identity(name, stamp=line.stamp)
            return replace(no_hash, bcrypt=line.hash), identity
        argon2 = self._accounts.password_hash(name)
        if argon2 is None or not account.enabled:
            return no_hash, None
        identity = Identity(name, robot=account.kind is AccountKind.ROBOT, version=account.version)
        return replace(no_hash, argon2=argon2), identity

    def _start_rehash(self, name: AccountName, old_hash: str, password: str) -> None:
        """Starts a task that hashes the account's password with the current parameters, and replaces `old_hash` in the
        store. Does nothing if a task already replaces `old_hash`."""
        if old_hash not in self._rehashes:
            task = self._rehashes[old_hash] = start_detached(self._rehash(name, old_hash, password))
            task.add_done_callback(lambda _: self._rehashes.pop(old_hash, None))

    async def _rehash(self, name: AccountName, old_hash: str, password: str) -> None:
        try:
            new_hash = await self._pool.run(partial(hash_password, password))
            await self._accounts.replace_hash(name, old_hash, new_hash)
        except RegistryError as error:
            log.warning("could not renew the password hash of %s, which has old parameters: %s", name, error)
