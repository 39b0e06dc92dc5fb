"""The two formats of an event: CloudEvents, and the format of Distribution (the reference registry). Also the pauses
between attempts to deliver one."""

from __future__ import annotations

import json
from typing import Any

import pytest

from registry.events.attempts import LONGEST_PAUSE_SECONDS, back_off
from registry.events.envelopes import cloud_event, distribution_envelope, rfc3339
from storage.content import BLOB_TYPE, Actor
from storage.outbox import Event, EventAction, NewEvent

ADDRESS = "https://registry.example.com"
DIGEST = "sha256:" + 64 * "a"
BY = Actor("alice", "192.0.2.1", "0123456789abcdef", "docker/28")


def event(action: EventAction, **fields: Any) -> Event:
    return Event(7, "11111111-2222-3333-4444-555555555555", NewEvent(action, "team/app", 1_700_000_000.5, BY, **fields))


def test_the_attributes_of_a_cloud_event() -> None:
    """The event has the attributes that CloudEvents 1.0 requires, and only attribute names that it allows."""
    media_type, body = cloud_event(
        event(EventAction.PUSH, tag="v1", digest=DIGEST, media_type="application/x", size=9), ADDRESS
    )
    assert media_type == "application/cloudevents+json; charset=utf-8"
    assert json.loads(body) == {
        "specversion": "1.0",
        "id": "11111111-2222-3333-4444-555555555555",
        "source": ADDRESS,
        "type": "entrepot.image.pushed",
        "subject": "team/app:v1",
        "time": "2023-11-14T22:13:20.500Z",
        "sequence": "00000000000000000007",
        "datacontenttype": "application/json",
        "data": {
            "action": "push",
            "repository": "team/app",
            "tag": "v1",
            "digest": DIGEST,
            "media_type": "application/x",
            "size": 9,
            "actor": "alice",
            "address": "192.0.2.1",
            "request_id": "0123456789abcdef",
            "user_agent": "docker/28",
        },
    }


@pytest.mark.parametrize("action", list(EventAction))
def test_every_action_has_both_formats(action: EventAction) -> None:
    """For each action, both formats are JSON and contain the event's id."""
    for envelope in (cloud_event, distribution_envelope):
        _, body = envelope(event(action, digest=DIGEST), ADDRESS)
        assert "11111111-2222" in json.dumps(json.loads(body))


def test_moves_and_deletes_in_the_format_of_distribution() -> None:
    """In the format of Distribution, a move of a tag is a push. A deleted tag has no digest, because an event with a
    digest would mean that the manifest was deleted."""

    def record(source: Event) -> dict[str, Any]:
        (envelope_record,) = json.loads(distribution_envelope(source, ADDRESS)[1])["events"]
        return dict(envelope_record)

    assert record(event(EventAction.MOVE, tag="v1", digest=DIGEST))["action"] == "push"
    assert record(event(EventAction.RETENTION, tag="v1", digest=DIGEST))["target"] == {
        "repository": "team/app",
        "tag": "v1",
    }
    assert record(event(EventAction.DELETE, digest=DIGEST))["target"]["digest"] == DIGEST
    fill = record(event(EventAction.FILL, digest=DIGEST, media_type=BLOB_TYPE, size=3))
    assert fill["target"]["url"] == f"{ADDRESS}/v2/team/app/blobs/{DIGEST}"
    assert fill["request"] == {
        "id": "0123456789abcdef",
        "addr": "192.0.2.1",
        "host": "registry.example.com",
        "method": "",
        "useragent": "docker/28",
    }


def test_blobs_in_the_format_of_distribution() -> None:
    """In the format of Distribution, a blob has its media type and URL."""
    for action, expected in (
        (EventAction.BLOB_PUSH, "push"),
        (EventAction.BLOB_MOUNT, "mount"),
        (EventAction.BLOB_DELETE, "delete"),
    ):
        _, body = distribution_envelope(event(action, digest=DIGEST, media_type=BLOB_TYPE, size=3), ADDRESS)
        (record,) = json.loads(body)["events"]
        assert (record["action"], record["target"]["mediaType"]) == (expected, "application/octet-stream")
        assert record["target"]["url"] == f"{ADDRESS}/v2/team/app/blobs/{DIGEST}"


def test_times_have_milliseconds() -> None:
    """Times are in UTC with milliseconds. Rounding can change the second."""
    assert rfc3339(0.9996) == "1970-01-01T00:00:01.000Z"


def test_the_pauses_grow_to_five_minutes() -> None:
    """Each pause is twice as long as the one before, up to five minutes. Half of each pause is random."""
    assert [back_off(failures, lambda: 1.0) for failures in (1, 2, 3)] == [1.0, 2.0, 4.0]
    assert [back_off(failures, lambda: 0.0) for failures in (1, 2, 3)] == [0.5, 1.0, 2.0]
    assert back_off(1000, lambda: 1.0) == LONGEST_PAUSE_SECONDS
