"""The accounts and groups of persons who log in at an OpenID provider."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from registry.auth.external.identity_claims import MAX_CLAIM_GROUPS
from registry.auth.external.openid_login import LoginFailed
from registry.config.auth_settings import AuthSettings
from storage.access import AccountKind, AccountName
from storage.errors import Denied
from tests.fakes.auth_worker import ADMIN, ALICE, CI, KNOWN_ADDRESS, AuthClock, auth_worker
from tests.fakes.openid_server import FakeOpenIDProvider
from tests.unit.registry.auth.external.conftest import log_in, settings

BCRYPT = "$2b$04$" + "a" * 53
"""A valid bcrypt hash; no test needs its password."""


async def test_groups_of_a_session(data: Path, clock: AuthClock, fake_provider: FakeOpenIDProvider) -> None:
    """A session has the groups in the provider's claim that the store has too, at most a hundred."""
    clock.now = time.time()
    fake_provider.secret = None
    async with auth_worker(data, clock, {"oidc": settings(fake_provider, groups_claim="groups")}) as worker:
        await worker.add_user(ALICE)
        group_names = [f"{'g' * 50}-{number:03}" for number in range(MAX_CLAIM_GROUPS + 1)]
        for name in ("dev", *group_names):
            await worker.accounts.add_group(AccountName(name), by=ADMIN)
        fake_provider.person["groups"] = ["dev", "none", "Not A Name", 5]
        assert (await log_in(worker, fake_provider)).groups == ("dev",)
        fake_provider.person["groups"] = group_names
        assert (await log_in(worker, fake_provider)).groups == tuple(group_names[:MAX_CLAIM_GROUPS])


@pytest.mark.slow
async def test_first_login_creates_an_account(data: Path, clock: AuthClock, fake_provider: FakeOpenIDProvider) -> None:
    """With the setting `create`, the first login creates an account for the person, without a password and without
    admin rights. A login under the name of a group or a robot is refused."""
    clock.now = time.time()
    fake_provider.secret = None
    async with auth_worker(data, clock, {"oidc": settings(fake_provider, create=True)}) as worker:
        await worker.add_robot()
        await worker.accounts.add_group(AccountName("dev"), by=ADMIN)
        for _ in range(2):
            assert (await log_in(worker, fake_provider)).name == ALICE
        account = worker.accounts.account(ALICE)
        assert (account.kind, account.admin, account.has_password) == (AccountKind.USER, False, False)
        audit_line = (await worker.audited("account.add"))[0]
        assert (audit_line.actor, audit_line.target, audit_line.address) == ("system", "alice", KNOWN_ADDRESS.address)
        for name in (CI, "dev", "system", "Alice", "", None, 5, "a b"):
            fake_provider.person["preferred_username"] = name
            with pytest.raises(LoginFailed):
                await log_in(worker, fake_provider)
        (*failed, _) = await worker.audited()
        assert {line.outcome for line in failed} == {"failed"}


async def test_without_create_no_account_is_made(
    data: Path, clock: AuthClock, fake_provider: FakeOpenIDProvider
) -> None:
    """Without `create`, a person without an account is refused."""
    clock.now = time.time()
    fake_provider.secret = None
    async with auth_worker(data, clock, {"oidc": settings(fake_provider)}) as worker:
        with pytest.raises(LoginFailed, match="no such account"):
            await log_in(worker, fake_provider)
        assert worker.accounts.accounts(None, None, 10).items == []


@pytest.mark.parametrize("line", ["ci:" + BCRYPT, "ci:{SHA}x", None], ids=["valid", "invalid hash", "unreadable file"])
async def test_create_does_not_take_a_name_of_the_htpasswd_file(
    data: Path, tmp_path: Path, clock: AuthClock, fake_provider: FakeOpenIDProvider, line: str | None
) -> None:
    """With the setting `create`, a login under a name in the htpasswd file creates no account. An account of the store
    would replace the one in the file, and would have the rights that were granted to it. While the file cannot be
    read, no account is created at all."""
    clock.now = time.time()
    fake_provider.secret = None
    fake_provider.person["preferred_username"] = CI
    file = tmp_path / "htpasswd"
    if line is not None:
        file.write_text(f"carol:{BCRYPT}\n{line}\n")
    options = {"oidc": settings(fake_provider, create=True), "auth": AuthSettings(htpasswd=file)}
    async with auth_worker(data, clock, options) as worker:
        with pytest.raises(LoginFailed, match="htpasswd") as failed:
            await log_in(worker, fake_provider)
        assert isinstance(failed.value.shown_error, Denied)
        assert worker.accounts.accounts(None, None, 10).items == []
        if line is not None:
            fake_provider.person["preferred_username"] = ALICE
            assert (await log_in(worker, fake_provider)).name == ALICE


@pytest.mark.parametrize("rights", ["grant", "membership"])
async def test_create_does_not_give_a_new_account_old_rights(
    data: Path, clock: AuthClock, fake_provider: FakeOpenIDProvider, rights: str
) -> None:
    """With the setting `create`, a login creates no account if the store has grants to the name or has it in a group,
    such as for a removed line of an htpasswd file. An admin can add the account, and then the person can log in."""
    clock.now = time.time()
    fake_provider.secret = None
    async with auth_worker(data, clock, {"oidc": settings(fake_provider, create=True)}) as worker:
        if rights == "grant":
            await worker.grant("user:alice", "prod/**", "pull,push")
        else:
            await worker.accounts.add_group(AccountName("dev"), by=ADMIN)
            await worker.accounts.add_member(AccountName("dev"), ALICE, by=ADMIN)
        with pytest.raises(LoginFailed, match="rights") as failed:
            await log_in(worker, fake_provider)
        assert isinstance(failed.value.shown_error, Denied)
        assert worker.accounts.accounts(None, None, 10).items == []
        await worker.add_user(ALICE, None)
        assert (await log_in(worker, fake_provider)).name == ALICE
