"""A test of the events of a mirror: a running server, which mirrors a fake Docker Hub, sends them to a webhook."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from tests.fakes.event_site import webhook_table
from tests.fakes.mirror_site import MirrorSite
from tests.fakes.webhook_receiver import first_events, receiver_running


def test_each_download_of_the_mirror_has_an_event(tmp_path: Path) -> None:
    """A webhook with the action `fill` gets one event for the manifest and for each blob that the mirror downloads from
    its upstream. These downloads cause no event with the action `push`."""
    with receiver_running() as receiver, ExitStack() as stack:
        more = webhook_table(receiver.url, actions=["fill", "push"])
        site = MirrorSite(tmp_path, stack).start(1000, 5000, more=more)
        answer = site.get_manifest()
        manifest = answer.json()
        digests = {part["digest"] for part in (manifest["config"], *manifest["layers"])}
        for digest in digests:
            assert site.http.get(f"/v2/library/app/blobs/{digest}").status_code == 200
        expected = {*digests, answer.headers["docker-content-digest"]}

        def event_digests() -> list[str]:
            return [body["data"]["digest"] for body in first_events(receiver.accepted())]

        receiver.wait_for(lambda: expected <= set(event_digests()), "event of each part")
    bodies = first_events(receiver.accepted())
    assert {body["data"]["repository"] for body in bodies} == {"docker.io/library/app"}
    assert {body["type"] for body in bodies} == {"entrepot.content.filled"}
    assert len(event_digests()) == len(set(event_digests()))
