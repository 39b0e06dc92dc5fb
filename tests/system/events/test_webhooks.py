"""Webhooks, with a real server of two workers and a receiver on loopback."""

from __future__ import annotations

from pathlib import Path

from tests.fakes.event_site import digest_named, event_site, push, webhook_table
from tests.fakes.plain_client import plain_client
from tests.fakes.webhook_receiver import receiver_running


def test_a_webhook_is_told_of_pushes_moves_and_deletes(tmp_path: Path) -> None:
    """A push, a push that moves a tag, and a delete reach the receiver in this order, as CloudEvents."""
    with receiver_running() as receiver, event_site(tmp_path, webhook_table(receiver.url)) as server:
        assert push(server, "team/app", "v1", "first").status_code == 201
        assert push(server, "team/app", "v1", "second").status_code == 201
        with plain_client(server.url) as client:
            assert client.delete(f"/v2/team/app/manifests/{digest_named('second')}").status_code == 202
        receiver.wait_for(lambda: len(receiver.requests) >= 4, "fourth event")
    told = [(body["type"], body["subject"], body["data"].get("previous")) for body in receiver.accepted()]
    assert told == [
        ("entrepot.image.pushed", "team/app:v1", None),
        ("entrepot.image.pushed", "team/app:v1", digest_named("first")),
        ("entrepot.image.deleted", "team/app:v1", None),
        ("entrepot.image.deleted", f"team/app@{digest_named('second')}", None),
    ]
