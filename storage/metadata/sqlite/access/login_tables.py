"""The tables of signing keys and of throttled logins.

A *signing key* signs the tokens that the endpoint `/token` issues. The *current* key signs new tokens. After a key is
replaced, its tokens are accepted for a limited time. Each change of the signing keys increments the *epoch*, a number
in the database. Processes read the signing keys again when the epoch has changed.

A *throttling key* is a text that names an account, a client's network, or both. The table stores a time for each
throttling key. A failed login under a key moves the key's time some seconds further into the future (GCRA, the generic
cell rate algorithm). While the key's time is too far in the future, the registry refuses logins under the key.

All functions take a connection. Functions that change something run inside a transaction, which the caller commits.
`by` is the actor (an account or a command) that the audit log names. `now` is the current time in seconds since 1970.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import apsw

from storage.access import LONGEST_THROTTLING_SECONDS, FailureCost, SigningKey
from storage.content import Actor
from storage.future_times import CLOCK_MARGIN_SECONDS
from storage.metadata.sqlite.access.account_table import increment_epoch
from storage.metadata.sqlite.access.audit_table import record

_SIGNING_KEYS = """
SELECT id, secret, created, retired, until FROM signing_key
 WHERE until IS NULL OR until > ? ORDER BY retired IS NOT NULL, retired DESC, id"""


def signing_keys(db: apsw.Connection, now: float) -> list[SigningKey]:
    """Returns the signing keys whose tokens are accepted. The current key comes first, if there is one. The replaced
    keys follow, most recently replaced first."""
    rows: list[Any] = db.execute(_SIGNING_KEYS, (now,)).fetchall()
    return [SigningKey(*row) for row in rows]


def ensure_key(db: apsw.Connection, by: Actor, now: float, make_key: Callable[[], SigningKey]) -> SigningKey:
    """Returns the current signing key. If there is none, adds the key that `make_key` returns."""
    for key in signing_keys(db, now):
        if key.retired is None:
            return key
    new_key = make_key()
    _add_signing_key(db, new_key)
    increment_epoch(db)
    record(db, by, now, "key.make", new_key.id)
    return new_key


def rotate_key(db: apsw.Connection, by: Actor, now: float, key: SigningKey, keep_seconds: float) -> None:
    """Makes `key` the current signing key. The tokens of earlier keys are accepted for at most `keep_seconds` after
    `now`. Deletes the keys whose tokens are no longer accepted."""
    db.execute("UPDATE signing_key SET retired = ?, until = ? WHERE retired IS NULL", (now, now + keep_seconds))
    db.execute("UPDATE signing_key SET until = min(until, ?) WHERE until IS NOT NULL", (now + keep_seconds,))
    db.execute("DELETE FROM signing_key WHERE until <= ?", (now,))
    _add_signing_key(db, key)
    increment_epoch(db)
    record(db, by, now, "key.rotate", key.id, {"keep": keep_seconds})


def _add_signing_key(db: apsw.Connection, key: SigningKey) -> None:
    db.execute("INSERT INTO signing_key (id, secret, created) VALUES (?, ?, ?)", (key.id, key.secret, key.created))


def throttled_until(db: apsw.Connection, now: float, key: str) -> float:
    """Returns the time of the throttling key, in seconds since 1970. Returns 0.0 if the table does not have the key, or
    if the time has passed."""
    until: float | None = db.execute("SELECT until FROM login_pace WHERE key = ? AND until > ?", (key, now)).get
    return until or 0.0


# ?1: the throttling key; ?2: the current time; ?3: the result of `FailureCost.latest_plausible_time` for the key. A
# stored time after ?3 was stored while the clock was ahead, and is ignored. ?4 and ?5: the fields `seconds` and
# `max_seconds` of `FailureCost`.
_ADD_FAILURE = """
INSERT INTO login_pace (key, until) VALUES (?1, ?2 + ?4)
    ON CONFLICT (key) DO UPDATE SET until = min(iif(until <= ?3, max(until, ?2), ?2) + ?4, ?2 + ?5)"""


def add_failures(db: apsw.Connection, now: float, costs: Mapping[str, FailureCost]) -> None:
    """Stores a failed login. `costs` maps each throttling key of the login to the cost of the failure under this key.

    Also corrects the times of all throttling keys:

    - Deletes the keys whose time has passed.
    - If a key's time is more than `LONGEST_THROTTLING_SECONDS + CLOCK_MARGIN_SECONDS` from now, sets the time to
      `LONGEST_THROTTLING_SECONDS` from now. A key has such a time if the clock was set back after the time was
      stored."""
    _delete_expired_keys(db, now)
    latest_possible = now + LONGEST_THROTTLING_SECONDS
    db.execute(
        "UPDATE login_pace SET until = ? WHERE until > ?", (latest_possible, latest_possible + CLOCK_MARGIN_SECONDS)
    )
    db.executemany(
        _ADD_FAILURE,
        ((key, now, cost.latest_plausible_time(now), cost.seconds, cost.max_seconds) for key, cost in costs.items()),
    )


def mark_once(db: apsw.Connection, now: float, key: str, seconds: float) -> bool:
    """Marks an event for `seconds` seconds, so that it happens only once in this time. An example is the completion of
    one login at the OpenID provider. `key` is stored as a throttling key, but it names the event instead of an
    account or a network. If the event is not marked yet, sets the time of `key` to `now + seconds` and returns True.
    Otherwise returns False and does not change the time.

    Deletes all throttling keys whose time has passed."""
    _delete_expired_keys(db, now)
    db.execute("INSERT INTO login_pace (key, until) VALUES (?, ?) ON CONFLICT DO NOTHING", (key, now + seconds))
    return bool(db.changes())


def _delete_expired_keys(db: apsw.Connection, now: float) -> None:
    db.execute("DELETE FROM login_pace WHERE until <= ?", (now,))


def clear_failures(db: apsw.Connection, keys: Sequence[str]) -> None:
    """Deletes these throttling keys, so that logins under these keys are no longer refused."""
    db.executemany("DELETE FROM login_pace WHERE key = ?", ((key,) for key in keys))
