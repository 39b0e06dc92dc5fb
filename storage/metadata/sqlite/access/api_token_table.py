"""The table of API tokens: secrets that an account uses in place of its password.

- People make *personal tokens* (purpose `personal`).
- The registry issues *refresh tokens* (purpose `login`) to `docker login`.

An expired token is treated as if it did not exist. Functions that change something run inside a transaction, which the
caller commits. `by` is the actor (an account or a command) that the audit log names. `now` is the time in seconds since
1970.

The *epoch* is a number in the database. A process may use the rights that it has cached until the epoch changes. Each
change that takes away a right increments the epoch.
"""

from __future__ import annotations

import json
from typing import Any, Final

import apsw

from storage.access import (
    AccountExists,
    AccountInvalid,
    AccountName,
    AccountUnknown,
    Action,
    ApiToken,
    TokenLimit,
    TokenPurpose,
)
from storage.content import Actor, Page
from storage.future_times import CLOCK_MARGIN_SECONDS
from storage.metadata.sqlite.access.account_table import (
    account,
    check_version,
    increment_epoch,
    limited_page,
    name_from_database,
)
from storage.metadata.sqlite.access.audit_table import record
from storage.metadata.sqlite.access.grant_table import pattern_from_database

MAX_PERSONAL_TOKENS = 500
"""Largest number of personal tokens of an account. Without this limit, a client could fill the disk with tokens."""
MAX_REFRESH_TOKENS: Final = 1000
"""Largest number of refresh tokens of an account. A login beyond this limit revokes another refresh token of the
account (`_revoke_excess`). Without this limit, a client that logs in again and again could fill the disk."""
_IN_USE_AFTER_SECONDS: Final = 3600.0
_IN_USE_FOR_SECONDS: Final = 30 * 86400.0
"""A refresh token is *in use* if it was last used at least `_IN_USE_AFTER_SECONDS` after the login, and less than
`_IN_USE_FOR_SECONDS` ago. Machines that stay logged in have tokens in use. Jobs that log in at each run leave
tokens that are not in use."""
_IN_USE_FRACTION: Final = 0.75
"""Tokens in use are kept in preference to other tokens, up to this fraction of `MAX_REFRESH_TOKENS`."""
_REVOKED_PER_LOGIN: Final = 100
"""Largest number of refresh tokens that one login revokes. This number keeps each transaction short. An account from an
older version can have far more than `MAX_REFRESH_TOKENS`; then several logins revoke the excess."""
MAX_LIMITS_PER_PAGE = 500
"""A page of tokens ends when its tokens together have this number of limits or more. A *limit* (`TokenLimit`) allows a
token some actions on the repositories whose names match a pattern."""
_TOKEN = "SELECT id, account, purpose, note, created, expires, limits, used, secret FROM api_token"
_TOKEN_BY_ID = _TOKEN + " WHERE id = ?1 AND (expires IS NULL OR expires > ?2)"
_PAGE = _TOKEN + " WHERE id > ?1 AND (expires IS NULL OR expires > ?2) ORDER BY id LIMIT ?3"
_PAGE_OF_ACCOUNT = (
    _TOKEN + " WHERE account = ?4 AND id > ?1 AND (expires IS NULL OR expires > ?2) AND (?5 IS NULL OR purpose = ?5) "
    "ORDER BY account, id LIMIT ?3"
)
_COUNT = "SELECT count(*) FROM api_token WHERE account = ? AND purpose = ?"
_RANK_IN_NOTE: Final = "row_number() OVER (PARTITION BY class, note ORDER BY last_use DESC, created DESC, id)"
"""The *rank* of a refresh token among the tokens of the same class and the same note: 1 for the most recently used
token, 2 for the next, and so on. The *note* of a refresh token is the client program and its IP address, such as
`docker at 192.0.2.7`. `_EXCESS_REFRESH_TOKENS` describes the classes."""
_CLASSIFIED: Final = (
    "SELECT id, note, created, ifnull(used, created) AS last_use, "
    "CASE WHEN ifnull(used, created) > ?3 THEN 0 WHEN used >= created + ?4 AND used > ?5 THEN 2 ELSE 1 END AS class "
    "FROM api_token WHERE account = ?1 AND purpose = 'login' AND id <> ?2"
)
_EXCESS_REFRESH_TOKENS: Final = (
    f"WITH classified AS ({_CLASSIFIED}), "
    f"ranked AS (SELECT *, {_RANK_IN_NOTE} AS rank FROM classified), "
    "placed AS (SELECT *, row_number() OVER (PARTITION BY class ORDER BY rank, last_use DESC, created DESC, id) "
    "AS place FROM ranked), "
    "limited AS (SELECT id, note, created, last_use, CASE WHEN class = 2 AND place > ?8 THEN 1 ELSE class END AS class "
    "FROM placed), "
    f"ranked_again AS (SELECT *, {_RANK_IN_NOTE} AS rank FROM limited) "
    "SELECT id FROM ranked_again ORDER BY class DESC, rank, last_use DESC, created DESC, id LIMIT ?6 OFFSET ?7"
)
"""Selects the ids of at most ?6 refresh tokens to revoke. The query sorts the refresh tokens of the account ?1, without
the new token (?2). It skips the first ?7 tokens, which the account keeps. The tokens are sorted by class:

- Class 2 comes first: at most ?8 tokens in use (?4 and ?5: see `_IN_USE_AFTER_SECONDS`). All machines behind one NAT
  that use the same client program have the same note, so only the class shows which of them stay logged in. The limit
  ?8 leaves room for the tokens of machines that have just logged in.
- Class 1 comes next: the tokens that are not in use, and the tokens in use beyond the limit ?8.
- Class 0 comes last: the tokens whose last use is later than ?3, the latest plausible time. This last use was stored
  while the clock was ahead. If a token was never used, its login counts as its last use.

Within a class, the tokens are sorted by their rank in their note (`_RANK_IN_NOTE`). The most recently used token of
each note comes first, then the second of each note, and so on. A host that logs in often thereby loses its own tokens,
and not those of other hosts. Tokens of the same rank are sorted by their last use, the most recent one first.

The steps of the query:

- `classified` gives each token its class, without the limit.
- `ranked` gives each token its rank in its note.
- `placed` gives each token its *place*: its position in the sorted list of its class.
- `limited` moves the tokens of class 2 whose place is greater than ?8 to class 1.
- `ranked_again` gives each token its rank again, because the moved tokens change the ranks in class 1."""
_LEAST_RECENTLY_USED: Final = f"SELECT id FROM ({_CLASSIFIED}) ORDER BY class, last_use, created, id LIMIT ?6"
"""Selects the ids of at most ?6 refresh tokens to revoke, except the new token (?2). The lowest class comes first. In
each class, the least recently used token comes first. This query ignores the notes and the limit of class 2, and takes
a tenth of the time of `_EXCESS_REFRESH_TOKENS`."""


def _token_of_row(row: tuple[Any, ...]) -> ApiToken:
    """Returns the token in a row that the statement `_TOKEN` has read."""
    token_id, owner, purpose, note, created, expires, limits, used, _ = row
    return ApiToken(
        id=token_id,
        account=name_from_database(owner),
        purpose=purpose,
        note=note,
        created=created,
        expires=expires,
        limits=None
        if limits is None
        else tuple(
            TokenLimit(pattern_from_database(pattern), Action(actions)) for pattern, actions in json.loads(limits)
        ),
        used=used,
    )


def get_token(db: apsw.Connection, now: float, token_id: str) -> tuple[ApiToken, bytes]:
    """Returns a token and the hash of its secret. Raises AccountUnknown if the token does not exist or has expired."""
    row = db.execute(_TOKEN_BY_ID, (token_id, now)).get
    if row is None:
        raise AccountUnknown("there is no such API token; it was revoked, or has expired")
    return _token_of_row(row), row[-1]


def token_page(
    db: apsw.Connection,
    now: float,
    owner: AccountName | None,
    after: str | None,
    limit: int,
    purpose: TokenPurpose | None = None,
) -> Page[ApiToken]:
    """Returns a page of at most `limit` tokens, sorted by id. The page ends earlier when its tokens together have
    `MAX_LIMITS_PER_PAGE` limits (`ApiToken.limits`) or more.

    - `owner`: the account whose tokens are returned. None: the tokens of all accounts are returned.
    - `after`: the page starts after this id. None: the page starts with the first id.
    - `purpose`: the purpose of the tokens that are returned. None: tokens of both purposes are returned. If `owner` is
      None, `purpose` has no effect."""
    values = (after or "", now, limit + 1)
    rows = db.execute(_PAGE, values) if owner is None else db.execute(_PAGE_OF_ACCOUNT, (*values, owner, purpose))
    return limited_page(
        rows,
        _token_of_row,
        count_parts=lambda token: len(token.limits or ()),
        limit=limit,
        max_parts=MAX_LIMITS_PER_PAGE,
    )


def add(
    db: apsw.Connection,
    by: Actor,
    now: float,
    new_token: ApiToken,
    secret_hash: bytes,
    expected_version: int | None = None,
) -> None:
    """Adds a token. If the token is a refresh token, and its account then has more than `MAX_REFRESH_TOKENS` refresh
    tokens, revokes some of the others (`_revoke_excess`). Only a revocation increments the epoch: no process can have
    cached anything about the new token.

    `expected_version`: the version that the account must have, or None. An account's version is a number that increases
    with each change of the account's password, `enabled` and `admin`.

    Raises:

    - Unauthorized if `expected_version` is not None, and the account has another version or does not exist.
    - AccountUnknown if `expected_version` is None, and the account does not exist.
    - AccountExists if another token has the id.
    - AccountInvalid if the token is a personal token, and the account already has `MAX_PERSONAL_TOKENS`."""
    _delete_expired(db, now)
    check_version(db, new_token.account, expected_version)
    account(db, new_token.account)  # raises AccountUnknown
    if db.execute("SELECT 1 FROM api_token WHERE id = ?", (new_token.id,)).get is not None:
        raise AccountExists("there is an API token with that id already")
    _check_token_count(db, new_token)
    limits = (
        None
        if new_token.limits is None
        else json.dumps([(limit.pattern, int(limit.actions)) for limit in new_token.limits])
    )
    db.execute(
        "INSERT INTO api_token (id, account, purpose, note, secret, created, expires, limits, used) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            *(new_token.id, new_token.account, new_token.purpose, new_token.note, secret_hash),
            *(new_token.created, new_token.expires, limits, new_token.used),
        ),
    )
    record(db, by, now, "token.add", new_token.account, _detail(new_token))
    if new_token.purpose == "login":
        _revoke_excess(db, by, now, new_token)


def _check_token_count(db: apsw.Connection, new_token: ApiToken) -> None:
    """Raises AccountInvalid if the token is a personal token, and its account already has `MAX_PERSONAL_TOKENS`."""
    if new_token.purpose != "personal":
        return
    if db.execute(_COUNT, (new_token.account, "personal")).get >= MAX_PERSONAL_TOKENS:
        raise AccountInvalid(
            f"{new_token.account} has {MAX_PERSONAL_TOKENS} API tokens, the largest number that an account can have; "
            "revoke some of these tokens first"
        )


def _revoke_excess(db: apsw.Connection, by: Actor, now: float, new_token: ApiToken) -> None:
    """If the account of `new_token` has more than `MAX_REFRESH_TOKENS` refresh tokens, revokes some of them, but not
    `new_token`. If there are too many to revoke in one call, selects them with the faster `_LEAST_RECENTLY_USED`."""
    excess = db.execute(_COUNT, (new_token.account, "login")).get - MAX_REFRESH_TOKENS
    if excess <= 0:
        return  # most calls end here, before the slow queries
    latest_plausible_time = now + CLOCK_MARGIN_SECONDS
    kept_count = MAX_REFRESH_TOKENS - 1  # in addition to the new token
    values = (
        *(new_token.account, new_token.id),
        *(latest_plausible_time, _IN_USE_AFTER_SECONDS, now - _IN_USE_FOR_SECONDS, _REVOKED_PER_LOGIN),
    )
    if excess > _REVOKED_PER_LOGIN:
        revoked = db.execute(_LEAST_RECENTLY_USED, values)
    else:
        revoked = db.execute(_EXCESS_REFRESH_TOKENS, (*values, kept_count, int(MAX_REFRESH_TOKENS * _IN_USE_FRACTION)))
    for (token_id,) in revoked.fetchall():
        excess_token, _ = get_token(db, now, str(token_id))
        _delete(db, by, now, excess_token)


def revoke(db: apsw.Connection, by: Actor, now: float, token_id: str) -> None:
    """Deletes a token. Raises AccountUnknown if the token does not exist or has expired."""
    revoked, _ = get_token(db, now, token_id)
    _delete_expired(db, now)
    _delete(db, by, now, revoked)


def _delete(db: apsw.Connection, by: Actor, now: float, revoked: ApiToken) -> None:
    """Deletes a token, increments the epoch, and writes a line to the audit log."""
    db.execute("DELETE FROM api_token WHERE id = ?", (revoked.id,))
    increment_epoch(db)
    record(db, by, now, "token.revoke", revoked.account, _detail(revoked))


def _delete_expired(db: apsw.Connection, now: float) -> None:
    db.execute("DELETE FROM api_token WHERE expires IS NOT NULL AND expires <= ?", (now,))


def _detail(api_token: ApiToken) -> dict[str, object]:
    """Returns the details for a line of the audit log: id, purpose, note and limits of the token."""
    detail: dict[str, object] = {"token": api_token.id, "purpose": api_token.purpose}
    if api_token.note:
        detail["note"] = api_token.note
    if api_token.limits is not None:
        detail["limits"] = [f"{limit.pattern} {','.join(limit.actions.words)}" for limit in api_token.limits]
    return detail


def save_token_use(db: apsw.Connection, token_id: str, used_at: float) -> None:
    """Stores `used_at` (seconds since 1970) as the last use of a token. Does nothing if the stored time is later than
    `used_at` by at most `CLOCK_MARGIN_SECONDS`. A stored time that is even later comes from a clock that was ahead, so
    `used_at` replaces it."""
    db.execute(
        "UPDATE api_token SET used = ?2 WHERE id = ?1 AND (used IS NULL OR used < ?2 OR used > ?3)",
        (token_id, used_at, used_at + CLOCK_MARGIN_SECONDS),
    )
