"""Checks passwords of accounts in the store and in the htpasswd file. If both have an account of the same name, the
account in the store is used.

Many machines can log in with the same right password at the same moment. Each process hashes a right password only once
an hour, even if many addresses send it. A wrong password is hashed, and counted as a failure, separately for each
network that sends it.

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
"""How long a wrong password is cached. If the same network sends a cached password again, the check refuses it without
hashing it. The time is long because docker sends its login for Docker Hub to every mirror of Docker Hub, again and
again."""
VERIFIED_SECONDS: Final = 3600.0
"""How long a right password is cached. In this time, the check accepts it from every address without hashing it."""

_AccountState = tuple[StoredHash, Identity | None]
"""What the store and the htpasswd file have for an account's name: the hash of the password, and the identity that the
password proves. The identity is None if no password is right: the account does not exist, is disabled, or has no
password."""


@dataclass(slots=True)
class _FailedCheck:
    """The cache entry of a wrong password. The cache key is a hash of the account's name, the password and the client's
    network (an IPv4 address, or an IPv6 network of 64 bits).

    - `checked_against`: the stored hash with which the password was compared, and the account's identity at that time.
      The entry is valid until the hash or the identity changes.
    - `epoch`: the store's epoch at the last check that the hash and the identity had not changed. The epoch is a number
      that every change of an account increases.
    - `file_version`: the version of the htpasswd file at the same check.
    - `until`: when the entry expires, in seconds since 1970.
    """

    checked_against: _AccountState
    epoch: int
    file_version: str
    until: float


@dataclass(frozen=True, slots=True)
class _VerifiedPassword:
    """The cache entry of a right password. The cache key is a hash of the account's name and the password.

    - `checked_against`: the stored hash that the password matched, and the account's identity at that time. Each use of
      the entry compares them with the current ones.
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
        self._failed_checks = SecretCache[_FailedCheck]()
        self._verified = SecretCache[_VerifiedPassword]()
        self._wrong_passwords = WrongPasswords(accounts, clock)
        self._comparisons: dict[tuple[bytes, StoredHash, Identity | None], asyncio.Task[PasswordComparison]] = {}
        """The running tasks that compare a password with a stored hash. The key consists of the password's cache key in
        `_verified` and the account's state."""
        self._rehashes: dict[str, asyncio.Task[None]] = {}
        """The running tasks that replace hashes with outdated parameters, by the old hash."""

    async def check(self, name: AccountName, password: str, address: str) -> Identity:
        """Checks the password of an account, and returns the account's identity. `address` is the client's address.
        Raises Unauthorized if the password is wrong, and TooManyRequests after too many failures or if too many logins
        wait for hashing. Raises StorageFull or StorageFailed if the store cannot count a failure.

        If the account does not exist, is disabled or has no password, every password is wrong, and the check takes as
        long as for other accounts. A client that repeats the same wrong password causes one failure a day, over all
        workers. So a program with an old password does not lock out a person at its address who knows the new password.

        The texts of Unauthorized are for the audit log. The caller sends the client the same text for all of them.
        """
        if len(password.encode()) > MAX_PASSWORD_BYTES:
            raise Unauthorized("the password is too long")
        key = self._failed_checks.key_of(name, password, network_of(address))
        file = await self._htpasswd.current() if self._htpasswd else EMPTY_CONTENT
        if self._was_wrong(key, name, file):
            raise Unauthorized("the password is wrong, as before")
        self._throttle.check(name, address)
        epoch = self._accounts.epoch()
        stored_hash, identity = account_state = self._account_state(name, file)
        comparison, has_started_hashing = await self._compare(name, password, account_state, site_of(address))
        if not comparison.is_right or identity is None:
            # There is no digest if the hashing has failed, or the hash in the store is malformed. Then it is not known
            # whether the password is wrong.
            if comparison.digest:
                until = self._clock() + WRONG_CACHED_SECONDS
                self._failed_checks.put(key, _FailedCheck(account_state, epoch, file.version, until))
            if await self._wrong_passwords.counts_as_failure(name, address, identity, comparison.digest):
                # Concurrent logins with the same password share one hashing, and count as one guess at the account.
                # Otherwise many machines with an old password would delay the logins of others for hours.
                await self._throttle.record_failure(
                    *(name, address),
                    counts_for_account=has_started_hashing,
                    counts_for_address=not self._is_line_unusable(name, file),
                )
            # The client sees neither text, so it cannot tell whether the account exists.
            raise Unauthorized("the password is wrong" if identity else "there is no such account with a password")
        await self._throttle.record_success(name, address)
        if stored_hash.argon2 is not None and needs_rehash(stored_hash.argon2):
            self._start_rehash(name, stored_hash.argon2, password)
        return identity

    def _is_line_unusable(self, name: AccountName, file: HtpasswdContent) -> bool:
        """Returns whether every password of the account `name` is refused because the account is not in the store, and
        the htpasswd file cannot be read or has only invalid lines for the name.

        The failed logins do not count for the client's address. Even the right password is refused, and the failures
        would delay everyone at the address, although no guess can succeed. The failed logins still count for the
        account. Otherwise the limits would reveal whether the store has an account of this name."""
        return self._htpasswd is not None and file.is_line_unusable(name) and not self._is_in_store(name)

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

    def _was_wrong(self, key: bytes, name: AccountName, file: HtpasswdContent) -> bool:
        """Returns whether the cache has a failed check under `key`, and the account `name` has not changed since that
        check. Reads the account only if the store or the htpasswd file has changed. `file` is the content of the
        htpasswd file."""
        failed = self._failed_checks.get(key)
        if failed is None:
            return False
        if self._clock() < failed.until:
            epoch = self._accounts.epoch()
            is_unchanged = (failed.epoch, failed.file_version) == (epoch, file.version)
            if is_unchanged or failed.checked_against == self._account_state(name, file):
                failed.epoch, failed.file_version = epoch, file.version
                return True
        self._failed_checks.remove(key)
        return False

    async def _compare(
        self, name: AccountName, password: str, account_state: _AccountState, site: str
    ) -> tuple[PasswordComparison, bool]:
        """Compares the password of the account `name` with the hash in `account_state`. If another request hashes the
        same password at this moment, waits for the result of that hashing. Returns the result, and whether this call
        has started a hashing. `site` is the client's network as `site_of` returns it, which is wider than the network
        of `network_of`. The queue of hashings counts logins by site. Raises TooManyRequests if too many logins wait for
        hashing."""
        # While the queue is full for this client, every password gets 429, even a password that is cached or is being
        # hashed. Otherwise a client could fill the queue and then guess without a counted failure: a wrong password
        # would get 429, but the right password would be accepted if it is cached.
        self._pool.check_queue(site)
        key = self._verified.key_of(name, password)
        verified = self._verified.get(key)
        if verified is not None:
            if verified.checked_against == account_state and self._clock() < verified.until:
                return PasswordComparison(True), False
            self._verified.remove(key)
        has_started_hashing = (key, *account_state) not in self._comparisons
        comparison = await wait_for_outcome(self._comparison_task(key, password, account_state, site))
        if comparison.is_right:
            self._verified.put(key, _VerifiedPassword(account_state, self._clock() + VERIFIED_SECONDS))
        return comparison, has_started_hashing

    def _comparison_task(
        self, key: bytes, password: str, account_state: _AccountState, site: str
    ) -> asyncio.Task[PasswordComparison]:
        """Returns the task that compares the password with the hash in `account_state`. Starts the task if it does
        not run yet. `key` is the cache key of `_verified`."""
        # After a change of the account, a new login has another `account_state`, and so does not get the result of an
        # older comparison.
        task_key = (key, *account_state)
        task = self._comparisons.get(task_key)
        if task is None:
            work = partial(compare_password, password, account_state[0])
            task = self._comparisons[task_key] = self._pool.start(work, site)
            task.add_done_callback(lambda _: self._comparisons.pop(task_key, None))
        return task

    def _account_state(self, name: AccountName, file: HtpasswdContent) -> _AccountState:
        """Returns the hash of an account's password, and the account's identity. `file` is the content of the htpasswd
        file."""
        dummy_salt = hashlib.blake2b(name.encode(), digest_size=SALT_BYTES, key=self._salt_key).digest()
        # No password matches `no_hash`. `compare_password` needs the highest bcrypt cost for every account, so that a
        # wrong password takes the same time for all accounts, including accounts that do not exist.
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
        """Starts a task that replaces the stored hash `old_hash` of an account with a hash that has the current
        parameters. `password` is the account's password. Does nothing if a task already replaces `old_hash`."""
        if old_hash not in self._rehashes:
            task = self._rehashes[old_hash] = start_detached(self._rehash(name, old_hash, password))
            task.add_done_callback(lambda _: self._rehashes.pop(old_hash, None))

    async def _rehash(self, name: AccountName, old_hash: str, password: str) -> None:
        try:
            new_hash = await self._pool.run(partial(hash_password, password))
            await self._accounts.replace_hash(name, old_hash, new_hash)
        except RegistryError as error:
            log.warning("could not renew the password hash of %s, which has old parameters: %s", name, error)
