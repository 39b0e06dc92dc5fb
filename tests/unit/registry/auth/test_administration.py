"""`Administration` changes accounts, grants and tokens. New grants and new limits of tokens must have simple patterns.
Older grants and limits with other patterns still apply."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from registry.auth.administration import Administration, parse_limit, parse_pattern
from registry.auth.password.htpasswd import HtpasswdFile
from registry.auth.rights.policy import Policy
from storage.access import AccountInvalid, AccountName, Action, Grant, Grantee, TokenLimit
from storage.patterns import NamePattern
from tests.fakes.auth_worker import ADMIN, ALICE, CI, KNOWN_ADDRESS, AuthWorker

OLD_PATTERN = NamePattern("*/app")
"""A pattern that an earlier version allowed for new grants."""
SUBJECT = Grantee.parse("user:alice")


async def _no_hash(password: str) -> str:
    raise AssertionError("no password is hashed here")


async def _any_hash(password: str) -> str:
    return "$argon2id$"


@pytest.fixture
def administration(worker: AuthWorker) -> Administration:
    return Administration(worker.accounts, _no_hash, clock=worker.clock)


async def test_hints_on_a_new_account(worker: AuthWorker, tmp_path: Path) -> None:
    """An admin who adds an account is told which rights it has from the start, and that it replaces an account of the
    htpasswd file. If there is nothing to tell, there are no hints."""
    file = await asyncio.to_thread(htpasswd_file, tmp_path)
    administration = Administration(worker.accounts, _any_hash, clock=worker.clock, htpasswd=file)
    await worker.grant("user:carol", "prod/**", "pull,push")
    for group in ("dev", "ops"):
        await worker.accounts.add_group(AccountName(group), by=ADMIN)
        await worker.accounts.add_member(AccountName(group), CI, by=ADMIN)
    carol = await administration.add_user(AccountName("carol"), None, by=ADMIN)
    assert carol.hints == ("carol had grants already, which apply to this account",)
    assert (await administration.add_robot(CI, by=ADMIN)).hints == (
        "the htpasswd file has an account ci, which this account replaces from now on",
        "ci was already in the groups dev, ops",
    )
    assert (await administration.add_robot(AccountName("dave"), by=ADMIN)).hints == ()


def htpasswd_file(folder: Path) -> HtpasswdFile:
    """Returns an htpasswd file with the account `ci`."""
    path = folder / "htpasswd"
    path.write_text(f"ci:$2b$04${'a' * 53}\n")
    return HtpasswdFile(path)


async def test_new_grants_need_simple_patterns(worker: AuthWorker, administration: Administration) -> None:
    """If one pattern of a call is not simple, the whole call is refused, and nothing is stored."""
    simple = [Grant(SUBJECT, NamePattern(text), Action.PULL) for text in ("team/app", "team/a-*", "team/*", "team/**")]
    with pytest.raises(AccountInvalid, match="a star before its end"):
        await administration.put_grants([*simple, Grant(SUBJECT, OLD_PATTERN, Action.PULL)], by=ADMIN)
    assert worker.accounts.grants([SUBJECT]) == []
    await administration.put_grants(simple, by=ADMIN)
    assert len(worker.accounts.grants([SUBJECT])) == 4


async def test_new_limits_need_simple_patterns(worker: AuthWorker, administration: Administration) -> None:
    """A token limit with a pattern that is not simple is refused, and no token is made."""
    assert parse_limit("team/app-*:pull") == TokenLimit(NamePattern("team/app-*"), Action.PULL)
    with pytest.raises(AccountInvalid, match="a star before its end"):
        await administration.add_token(ALICE, limits=[parse_limit("*/app:pull")], by=ADMIN)
    assert list(worker.accounts.tokens(ALICE, None, 10).items) == []
    await administration.add_token(ALICE, limits=[parse_limit("team/app-*:pull")], by=ADMIN)


async def test_older_grants_still_apply(worker: AuthWorker, administration: Administration) -> None:
    """A grant that an earlier version stored still applies, and can be removed."""
    await worker.grant("user:alice", OLD_PATTERN, "pull")
    identity = await worker.access.credential_verifier.verify_basic(ALICE, "correct horse battery", KNOWN_ADDRESS)
    policy = Policy(worker.accounts, worker.access.revocation_check)
    assert policy.principal(identity).may(Action.PULL, "team/app")
    assert not policy.principal(identity).may(Action.PULL, "team/web")
    await administration.remove_grant(SUBJECT, parse_pattern(OLD_PATTERN), by=ADMIN)
    assert not policy.principal(identity).may(Action.PULL, "team/app")


async def test_older_limits_still_apply(worker: AuthWorker) -> None:
    """A token limit that an earlier version stored still applies."""
    await worker.grant("user:alice", "**", "pull")
    token = await worker.add_token(ALICE, limits=(TokenLimit(OLD_PATTERN, Action.PULL),))
    identity = await worker.access.credential_verifier.verify_basic(ALICE, token.text, KNOWN_ADDRESS)
    principal = Policy(worker.accounts, worker.access.revocation_check).principal(identity)
    assert principal.may(Action.PULL, "team/app")
    assert not principal.may(Action.PULL, "team/web")
