"""The cache of verified credentials: its keys, its largest size, and the principals that it keeps."""

from __future__ import annotations

import base64

from registry.auth.authorization_header import Basic, Bearer
from registry.auth.credential_cache import (
    MAX_CACHED_BASIC_CREDENTIALS,
    MAX_CACHED_BEARER_TOKENS,
    CredentialCache,
    VerifiedCredential,
    header_of,
)
from registry.auth.revocation_across_workers import principal_of
from registry.auth.rights.policy import Policy
from registry.auth.rights.principal import Identity
from tests.fakes.auth_worker import ALICE, KNOWN_ADDRESS, PASSWORD, AuthWorker

LOGIN, TOKEN = Basic("alice", "secret"), Bearer("abc.def.ghi")


def test_keys_differ() -> None:
    """The key of an entry depends on the header, on the address, and on a random key that each cache makes."""
    cache = CredentialCache()
    headers = [b"Bearer a", b"Bearer b", b"Basic a"]
    keys = {cache.key_of(header, address) for header in headers for address in ("", "192.0.2.1", "192.0.2.2")}
    assert len(keys) == 9
    assert cache.key_of(b"Bearer a", "192.0.2.1") == cache.key_of(b"Bearer a", "192.0.2.1")
    assert cache.key_of(b"Bearer a", "192.0.2.1") != CredentialCache().key_of(b"Bearer a", "192.0.2.1")


def test_the_header_of_a_credential() -> None:
    """`header_of` returns the header that a client would send for the credential. A user name that comes from a form
    can contain a colon. Its header differs from that of a shorter name whose secret contains the colon."""
    assert header_of(LOGIN) == b"Basic " + base64.b64encode(b"alice:secret")
    assert header_of(TOKEN) == b"Bearer abc.def.ghi"
    assert header_of(Basic("alice", "a:b")) != header_of(Basic("alice:a", "b"))


def test_an_entry_expires_with_its_identity() -> None:
    """An entry expires at the end of its own lifetime, or together with its identity if that expires earlier."""
    assert VerifiedCredential(Identity("alice", expires=5.0), 1, 10.0).expires == 5.0
    assert VerifiedCredential(Identity("alice", expires=50.0), 1, 10.0).expires == 10.0
    assert VerifiedCredential(Identity("alice"), 1, 10.0).expires == 10.0


def test_the_cache_has_a_largest_size() -> None:
    """The oldest entries are evicted. Bearer tokens do not evict logins, because anyone can get many bearer tokens."""
    cache = CredentialCache()
    login = cache.key_of(header_of(LOGIN), "")
    cache.put(login, VerifiedCredential(Identity("alice"), 1, 1.0), LOGIN)
    keys = [
        cache.key_of(b"%d" % number, "") for number in range(MAX_CACHED_BEARER_TOKENS + MAX_CACHED_BASIC_CREDENTIALS)
    ]
    for key in keys:
        cache.put(key, VerifiedCredential(Identity(None), 1, 1.0), TOKEN)
    assert len(cache) == MAX_CACHED_BEARER_TOKENS + 1
    assert cache.get(login) is not None
    assert cache.get(keys[0]) is None
    assert cache.get(keys[-1]) is not None
    cache.remove(keys[-1])
    assert cache.get(keys[-1]) is None
    for key in keys:
        cache.put(key, VerifiedCredential(Identity("bob"), 1, 1.0), LOGIN)
    assert cache.get(login) is None


async def test_the_principal_is_made_again_when_rights_change(worker: AuthWorker) -> None:
    """The principal of a credential is cached. It is made again after the store's epoch has changed. The epoch is a
    number that increases with each change of accounts and rights."""
    policy = Policy(worker.accounts, worker.access.revocation_check)
    verifier = worker.access.credential_verifier
    first = await principal_of(policy, await verifier.verify(Basic(ALICE, PASSWORD), KNOWN_ADDRESS))
    assert await principal_of(policy, await verifier.verify(Basic(ALICE, PASSWORD), KNOWN_ADDRESS)) is first
    await worker.grant("user:alice", "team/**", "pull")
    second = await principal_of(policy, await verifier.verify(Basic(ALICE, PASSWORD), KNOWN_ADDRESS))
    assert second is not first
    assert second.epoch == worker.accounts.epoch()
