"""The cost of finding the due deliveries of a webhook while very many deliveries are pending."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import apsw
import pytest

from storage.composition import prepare_data_dir
from storage.data_dir.layout import Layout
from storage.metadata.sqlite.database import connect
from storage.metadata.sqlite.upkeep.due_deliveries import MAX_FIRST_HEADS, WAIT_SECONDS_PER_HEAD, find_due
from storage.outbox import DueDeliveries

HOOK = "hook"
NOW = 1000.0
LATER = NOW + 60
MAX_REPOSITORIES, MAX_EVENTS = 10, 5


def store_with(folder: Path, repositories: Iterable[str], next_at: float = 0.0) -> apsw.Connection:
    """Opens a store with one pending delivery for each of the repositories, in this order. A name may occur again.
    `next_at`: when the deliveries are due."""
    prepare_data_dir(folder)
    db = connect(Layout(folder).metadata)
    with db:
        for number, repository in enumerate(repositories, 1):
            db.execute(
                "INSERT INTO event (id, uuid, at, action, repository, media_type, size, actor, address, request_id, "
                "user_agent, reason, kept) VALUES (?, 'u', 1, 'push', ?, '', 0, '', '', '', '', '', 0)",
                (number, repository),
            )
            db.execute(
                "INSERT INTO event_delivery (webhook, event, repository, next_at) VALUES (?, ?, ?, ?)",
                (HOOK, number, repository, next_at),
            )
    return db


def find(db: apsw.Connection, *excluded: str) -> tuple[DueDeliveries, int]:
    """Returns the due deliveries, and how many steps SQLite's virtual machine took to find them."""
    steps = list[int]()

    def count(event: dict[str, Any]) -> None:
        steps.append(event["stmt_status"]["SQLITE_STMTSTATUS_VM_STEP"])

    db.trace_v2(2, count)  # SQLITE_TRACE_PROFILE
    due = find_due(db, HOOK, NOW, max_repositories=MAX_REPOSITORIES, max_events=MAX_EVENTS, excluded=excluded)
    db.trace_v2(0)
    return due, sum(steps)


def heads(due: DueDeliveries) -> list[int]:
    """Returns the number of the first event of each queue."""
    return [queue[0].event.number for queue in due.queues]


def names(count: int) -> list[str]:
    """Returns names that are not in alphabetical order."""
    return [f"team/{number * 7919 % 100_003:06d}" for number in range(count)]


@pytest.mark.parametrize("next_at", [0.0, LATER])
def test_cost_of_many_repositories_is_linear(tmp_path: Path, next_at: float) -> None:
    """Twice as many repositories with a pending delivery take at most twice as many steps, whether the deliveries are
    due now or later."""
    steps = list[int]()
    for count in (1000, 2000):
        db = store_with(tmp_path / str(count), names(count), next_at)
        due, steps_of_count = find(db)
        expected = ([], LATER) if next_at else (list(range(1, MAX_REPOSITORIES + 1)), None)
        assert (heads(due), due.next_at) == expected
        steps.append(steps_of_count)
        db.close()
    assert steps[1] <= 2.2 * steps[0]


def test_cost_does_not_grow_with_the_repositories_while_the_oldest_are_due(tmp_path: Path) -> None:
    """If the oldest deliveries are due, the number of steps does not depend on the number of repositories."""
    steps = list[int]()
    for count in (MAX_FIRST_HEADS + 1, 3 * MAX_FIRST_HEADS):
        db = store_with(tmp_path / str(count), names(count))
        due, steps_of_count = find(db)
        assert (heads(due), due.wait_seconds) == (list(range(1, MAX_REPOSITORIES + 1)), 0.0)
        steps.append(steps_of_count)
        db.close()
    assert steps[1] <= 1.1 * steps[0]


@pytest.mark.parametrize("next_at", [0.0, LATER])
def test_cost_does_not_grow_with_the_deliveries_of_a_repository(tmp_path: Path, next_at: float) -> None:
    """A few repositories have many deliveries each. The number of steps does not depend on the number of
    deliveries."""
    steps = list[int]()
    for count in (30, 600):
        db = store_with(tmp_path / str(count), (f"team/{number % 3}" for number in range(count)), next_at)
        due, steps_of_count = find(db)
        assert (heads(due), due.next_at) == (([], LATER) if next_at else ([1, 2, 3], None))
        assert [len(queue) for queue in due.queues] == ([] if next_at else [MAX_EVENTS] * 3)
        steps.append(steps_of_count)
        db.close()
    assert steps[1] <= 1.1 * steps[0]


def test_due_deliveries_of_many_repositories(tmp_path: Path) -> None:
    """If many repositories have pending deliveries, `find_due` finds the ones that are due, the oldest first. It leaves
    out excluded repositories and dead letters, and repositories whose oldest delivery is not due."""
    repositories = names(MAX_FIRST_HEADS + 100)
    db = store_with(tmp_path, [*repositories, *repositories], LATER)
    with db:
        dead, due_now, excluded, far = repositories[7], repositories[9], repositories[11], repositories[500]
        db.execute("UPDATE event_delivery SET next_at = 0 WHERE repository IN (?, ?, ?)", (dead, due_now, excluded))
        db.execute("UPDATE event_delivery SET dead = 1 WHERE event = 8")
        db.execute("UPDATE event_delivery SET next_at = 0 WHERE event > 600 AND repository = ?", (repositories[3],))
        db.execute("UPDATE event_delivery SET next_at = ? WHERE repository = ?", (NOW + 10, repositories[400]))
        # The clock was set back after this time was stored.
        db.execute("UPDATE event_delivery SET next_at = ? WHERE repository = ?", (NOW + 10_000, far))
    due, _ = find(db, excluded)
    # Of `due_now` and `far`, and the second event of `dead`, whose first event is a dead letter.
    assert heads(due) == [10, 501, 608]
    assert [len(queue) for queue in due.queues] == [2, 2, 1]
    assert due.next_at == NOW + 10
    assert due.wait_seconds == len(repositories) * WAIT_SECONDS_PER_HEAD
    db.close()
