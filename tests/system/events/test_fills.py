"""Events of a mirror, with a real server in front of a fake Docker Hub."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from tests.fakes.event_site import webhook_table
from tests.fakes.mirror_site import MirrorSite
from tests.fakes.webhook_receiver import first_events, receiver_running


def test_a_pull_through_the_mirror_has_its_fills(tmp_path: Path) -> None:
    """A webhook that wants fills gets one event for the manifest and for each blob that the mirror fetches, and no
    push."""
    with receiver_running() as receiver, ExitStack() as stack:
        more = webhook_table(receiver.url, actions=["fill", "push"])
        site = MirrorSite(tmp_path, stack).start(1000, 5000, more=more)
        answer = site.inspect()
        manifest = answer.json()
        digests = {part["digest"] for part in (manifest["config"], *manifest["layers"])}
        for digest in digests:
            assert site.http.get(f"/v2/library/app/blobs/{digest}").status_code == 200
        wanted = {*digests, answer.headers["docker-content-digest"]}

        def told() -> list[str]:
            return [body["data"]["digest"] for body in first_events(receiver.accepted())]

        receiver.wait_for(lambda: wanted <= set(told()), "event of each part")
    bodies = first_events(receiver.accepted())
    assert {body["data"]["repository"] for body in bodies} == {"docker.io/library/app"}
    assert {body["type"] for body in bodies} == {"entrepot.content.filled"}
    assert len(told()) == len(set(told()))
