"""API tokens. An expired token is treated as if it did not exist."""

from __future__ import annotations

import json
from typing import Any

import apsw

from storage.access import AccountExists, AccountInvalid, AccountName, AccountUnknown, Action, ApiToken, TokenLimit
from storage.content import Actor, Page
from storage.metadata.sqlite.access.account_table import account, increment_epoch, limited_page, name_from_database
from storage.metadata.sqlite.access.audit_table import record
from storage.metadata.sqlite.access.grant_table import pattern_from_database

MOST_TOKENS = 500
"""Most personal API tokens of an account, so that nobody can fill the disk with them."""
LIMITS_OF_A_PAGE = 500
"""Approximate limit of the token limits on a page."""
_TOKEN = "SELECT id, account, purpose, note, created, expires, limits, used, secret FROM api_token"
_ONE = _TOKEN + " WHERE id = ?1 AND (expires IS NULL OR expires > ?2)"
_PAGE = _TOKEN + " WHERE id > ?1 AND (expires IS NULL OR expires > ?2) ORDER BY id LIMIT ?3"
_PAGE_OF_ONE = (
    _TOKEN + " WHERE account = ?4 AND id > ?1 AND (expires IS NULL OR expires > ?2) ORDER BY account, id LIMIT ?3"
)


def _token(row: tuple[Any, ...]) -> ApiToken:
    token_id, owner, purpose, note, created, expires, limits, used, _ = row
    return ApiToken(
        token_id,
        name_from_database(owner),
        purpose,
        note,
        created,
        expires,
        None
        if limits is None
        else tuple(TokenLimit(pattern_from_database(p), Action(a)) for p, a in json.loads(limits)),
        used,
    )


def token(db: apsw.Connection, now: float, token_id: str) -> tuple[ApiToken, bytes]:
    row = db.execute(_ONE, (token_id, now)).get
    if row is None:
        raise AccountUnknown("there is no such API token; it was revoked, or has expired")
    return _token(row), row[-1]


def page(db: apsw.Connection, now: float, owner: AccountName | None, after: str | None, limit: int) -> Page[ApiToken]:
    values = (after or "", now, limit + 1)
    found = db.execute(_PAGE, values) if owner is None else db.execute(_PAGE_OF_ONE, (*values, owner))
    return limited_page(found, _token, lambda token: len(token.limits or ()), limit, LIMITS_OF_A_PAGE)


def add(db: apsw.Connection, by: Actor, now: float, made: ApiToken, secret_hash: bytes) -> None:
    """Adds a token. The epoch stays, since no process can have cached anything about the token."""
    _prune(db, now)
    account(db, made.account)
    if db.execute("SELECT 1 FROM api_token WHERE id = ?", (made.id,)).get is not None:
        raise AccountExists("there is an API token with that id already")
    _check_room(db, made)
    limits = None if made.limits is None else json.dumps([(one.pattern, int(one.actions)) for one in made.limits])
    db.execute(
        "INSERT INTO api_token (id, account, purpose, note, secret, created, expires, limits, used) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            *(made.id, made.account, made.purpose, made.note, secret_hash),
            *(made.created, made.expires, limits, made.used),
        ),
    )
    record(db, by, now, "token.add", made.account, _detail(made))


def _check_room(db: apsw.Connection, made: ApiToken) -> None:
    """Raises AccountInvalid if the account has too many personal tokens. For login tokens, the caller removes the
    oldest."""
    counted = "SELECT count(*) FROM api_token WHERE account = ? AND purpose = 'personal'"
    if made.purpose == "personal" and db.execute(counted, (made.account,)).get >= MOST_TOKENS:
        raise AccountInvalid(
            f"{made.account} has {MOST_TOKENS} API tokens, as many as an account can have; revoke some first"
        )


def revoke(db: apsw.Connection, by: Actor, now: float, token_id: str) -> None:
    revoked, _ = token(db, now, token_id)
    _prune(db, now)
    db.execute("DELETE FROM api_token WHERE id = ?", (token_id,))
    increment_epoch(db)
    record(db, by, now, "token.revoke", revoked.account, _detail(revoked))


def _prune(db: apsw.Connection, now: float) -> None:
    db.execute("DELETE FROM api_token WHERE expires IS NOT NULL AND expires <= ?", (now,))


def _detail(made: ApiToken) -> dict[str, object]:
    detail: dict[str, object] = {"token": made.id, "purpose": made.purpose}
    if made.note:
        detail["note"] = made.note
    if made.limits is not None:
        detail["limits"] = [f"{one.pattern} {','.join(one.actions.words)}" for one in made.limits]
    return detail


def note_use(db: apsw.Connection, token_id: str, at: float) -> None:
    db.execute("UPDATE api_token SET used = ?2 WHERE id = ?1 AND (used IS NULL OR used < ?2)", (token_id, at))
