"""Tests of webhooks, with a running server of two workers. HTTP servers of the tests, called receivers, get the
events."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.certificate_authority import CertificateAuthority
from tests.fakes.commands import entrepot, entrepot_output
from tests.fakes.event_site import digest_named, event_site, push, webhook_table
from tests.fakes.mirror_site import wait_until
from tests.fakes.plain_client import plain_client
from tests.fakes.server_process import RegistryServer
from tests.fakes.webhook_receiver import WebhookReceiver, first_events, receiver_running

SETTINGS = ("--config", "entrepot.toml", "--data", "data")
"""The options with which commands use the settings and the data directory of the server."""


def deliveries(folder: Path, *options: str) -> list[dict[str, Any]]:
    """Returns the deliveries that `entrepot events list` lists, by default the pending ones."""
    found: list[dict[str, Any]] = json.loads(
        entrepot_output("events", "list", "--json", *(options or ("--pending",)), *SETTINGS, folder=folder)
    )
    return found


def push_image(server: RegistryServer, repo: str, tag: str, name: str) -> None:
    """Pushes an image, which must succeed."""
    assert push(server, repo, tag, name).status_code == 201


def subjects(receiver: WebhookReceiver) -> list[str]:
    """Returns the subjects of the events that the receiver has accepted, without repetitions."""
    return [body["subject"] for body in first_events(receiver.accepted())]


def test_events_of_pushes_moves_and_deletes(tmp_path: Path) -> None:
    """The receiver gets the events of a push, of a push that moves a tag, and of a delete, in this order. They are
    CloudEvents, and each request is signed with the secret."""
    (tmp_path / "secret").write_text("s3cret\n")
    settings = webhook_table("URL", secret_file=str(tmp_path / "secret"))
    with receiver_running() as receiver, event_site(tmp_path, settings.replace("URL", receiver.url)) as server:
        push_image(server, "team/app", "v1", "first")
        push_image(server, "team/app", "v1", "second")
        with plain_client(server.url) as client:
            assert client.delete(f"/v2/team/app/manifests/{digest_named('second')}").status_code == 202
        receiver.wait_for(lambda: len(receiver.requests) >= 4, "fourth event")
    events = [(body["type"], body["subject"], body["data"].get("previous")) for body in receiver.accepted()]
    assert events == [
        ("entrepot.image.pushed", "team/app:v1", None),
        ("entrepot.image.pushed", "team/app:v1", digest_named("first")),
        ("entrepot.image.deleted", "team/app:v1", None),
        ("entrepot.image.deleted", f"team/app@{digest_named('second')}", None),
    ]
    for posted in receiver.requests:
        expected = openssl_hmac(posted.body, "s3cret")
        assert posted.headers["x-hub-signature-256"] == f"sha256={expected}"
        assert posted.headers["content-type"].startswith("application/cloudevents+json")


def openssl_hmac(body: bytes, secret: str) -> str:
    """Returns the HMAC-SHA256 in hexadecimal, as openssl computes it."""
    command = ["openssl", "dgst", "-sha256", "-hmac", secret, "-hex"]
    result = subprocess.run(command, input=body, capture_output=True, check=True)
    return result.stdout.decode().split()[-1]


def test_format_of_distribution(tmp_path: Path) -> None:
    """A webhook with the format `distribution` gets events in the format of CNCF Distribution (registry:2)."""
    settings = 'public_url = "https://registry.example.com"\ninsecure_open = true\n' + webhook_table(
        "URL", format="distribution"
    )
    with receiver_running() as receiver, event_site(tmp_path, settings.replace("URL", receiver.url)) as server:
        push_image(server, "team/app", "v1", "first")
        with plain_client(server.url) as client:
            assert client.delete("/v2/team/app/manifests/v1").status_code == 202
        receiver.wait_for(lambda: len(receiver.requests) >= 2, "second event")
    assert {posted.headers["content-type"] for posted in receiver.requests} == {
        "application/vnd.docker.distribution.events.v2+json"
    }
    (pushed_event,), (deleted,) = (body["events"] for body in receiver.accepted())
    digest = digest_named("first")
    assert pushed_event["target"] == {
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "digest": digest,
        "size": pushed_event["target"]["size"],
        "length": pushed_event["target"]["size"],
        "repository": "team/app",
        "url": f"https://registry.example.com/v2/team/app/manifests/{digest}",
        "tag": "v1",
    }
    assert (pushed_event["action"], pushed_event["request"]["method"]) == ("push", "PUT")
    assert pushed_event["request"]["host"] == "registry.example.com"
    assert pushed_event["actor"] == {"name": "anonymous"}
    assert (deleted["action"], deleted["target"]) == ("delete", {"repository": "team/app", "tag": "v1"})


def test_filters(tmp_path: Path) -> None:
    """A webhook gets only the events with its actions and repositories. A push that moves a tag has the action `move`
    as well."""
    with receiver_running() as moves, receiver_running() as other:
        settings = webhook_table(moves.url, "moves", actions=["move"], repositories=["team/**"])
        settings += webhook_table(other.url, "other", repositories=["other/*"])
        with event_site(tmp_path, settings) as server:
            push_image(server, "team/app", "v1", "first")
            push_image(server, "team/app", "v1", "second")
            push_image(server, "alone", "v1", "first")
            push_image(server, "other/app", "v1", "first")
            command = ("tag", "restore", "team/app:v1", *SETTINGS)
            entrepot_output(*command, folder=tmp_path)
            moves.wait_for(lambda: len(moves.requests) >= 2, "second event")
            other.wait_for(lambda: len(other.requests) >= 1, "event")
            wait_until(lambda: deliveries(tmp_path) == [], "the deliveries to end")
    assert [(body["type"], body["data"]["digest"]) for body in moves.accepted()] == [
        ("entrepot.image.pushed", digest_named("second")),
        ("entrepot.tag.moved", digest_named("first")),
    ]
    assert subjects(other) == ["other/app:v1"]


def test_events_of_pulls(tmp_path: Path) -> None:
    """A webhook with the action `pull` gets an event for each pull, including pulls that are served from the cache of
    responses. Other webhooks get no events of pulls."""
    with receiver_running() as pulls, receiver_running() as other:
        settings = webhook_table(pulls.url, "pulls", actions=["pull"]) + webhook_table(other.url, "other")
        with event_site(tmp_path, settings) as server, plain_client(server.url) as client:
            push_image(server, "team/app", "v1", "first")
            for _ in range(5):
                assert client.get("/v2/team/app/manifests/v1", headers={"user-agent": "x"}).status_code == 200
            pulls.wait_for(lambda: len(pulls.requests) >= 5, "fifth pull")
    events = [(body["type"], body["data"]["digest"], body["data"]["address"]) for body in pulls.accepted()]
    assert events == [("entrepot.image.pulled", digest_named("first"), "127.0.0.1")] * 5
    assert subjects(other) == ["team/app:v1"]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("answers 500", "it answered 500"),
        ("never answers", "it did not answer within 1 s"),
        ("redirects", "it answered 307, a redirect, which is not followed"),
        ("is not there", "ConnectError"),
    ],
)
def test_failing_receiver_does_not_disturb_pushes(tmp_path: Path, fault: str, reason: str) -> None:
    """While one receiver does not accept events, pushes succeed and another receiver gets its events. The log has a
    line with the reason. A redirect is not followed."""
    with (
        receiver_running() as failing_receiver,
        receiver_running() as working_receiver,
        receiver_running() as redirect_target,
    ):
        url = failing_receiver.url
        if fault == "answers 500":
            failing_receiver.status = lambda _: 500
        elif fault == "never answers":
            failing_receiver.open.clear()
        elif fault == "redirects":
            failing_receiver.status, failing_receiver.location = (lambda _: 307), redirect_target.url
        else:
            with socket.socket() as unused:
                unused.bind(("127.0.0.1", 0))
                url = f"http://127.0.0.1:{unused.getsockname()[1]}/hook"
        timeout = {"timeout": 1} if fault == "never answers" else {}
        settings = webhook_table(url, "bad", **timeout) + webhook_table(working_receiver.url, "good")
        with event_site(tmp_path, settings) as server:
            for number in range(20):
                push_image(server, "team/app", f"v{number}", f"image {number}")
            working_receiver.wait_for(lambda: len(working_receiver.requests) >= 20, "20 events")
            wait_until(lambda: f"webhook bad: {reason}" in server.log_text(), "a line about the fault")
            pending = deliveries(tmp_path)
    assert subjects(working_receiver) == [f"team/app:v{number}" for number in range(20)]
    assert {delivery["webhook"] for delivery in pending} == {"bad"}
    assert len(pending) == 20
    assert redirect_target.requests == []


def test_private_addresses_need_the_setting(tmp_path: Path) -> None:
    """Without the setting `private_network`, the server sends no event to an address of its own machine, whether the
    URL has the address or a host name."""
    with receiver_running() as receiver:
        by_name = receiver.url.replace("127.0.0.1", "localhost")
        settings = webhook_table(receiver.url, "address", private_network=False)
        settings += webhook_table(by_name, "name", private_network=False)
        with event_site(tmp_path, settings) as server:
            push_image(server, "team/app", "v1", "first")
            for name in ("address", "name"):
                line = f"webhook {name}: "
                wait_until(lambda line=line: line in server.log_text(), "a line about the address")  # type: ignore[misc]
            assert server.log_text().count("which is loopback; to allow it, set private_network = true") >= 2
    assert receiver.requests == []


def test_tls_with_a_private_authority(tmp_path: Path) -> None:
    """A receiver with TLS gets events if `ca_file` has the authority that has signed its certificate. Without
    `ca_file`, this receiver gets no events."""
    authority = CertificateAuthority(tmp_path)
    with receiver_running(pair=authority.sign("receiver")) as receiver:
        settings = webhook_table(receiver.url, "trusted", ca_file=str(authority.certificate))
        settings += webhook_table(receiver.url, "untrusted")
        with event_site(tmp_path, settings) as server:
            push_image(server, "team/app", "v1", "first")
            receiver.wait_for(lambda: len(receiver.requests) >= 1, "event")
            wait_until(lambda: "webhook untrusted: ConnectError" in server.log_text(), "a line about the certificate")
            wait_until(lambda: [each["webhook"] for each in deliveries(tmp_path)] == ["untrusted"], "the trusted one")
    assert len(receiver.requests) == 1


def metric_lines(server: RegistryServer) -> list[str]:
    with plain_client(server.url) as client:
        return client.get("/metrics").text.splitlines()


def test_dead_letters_can_be_sent_again(tmp_path: Path) -> None:
    """If the receiver refuses an event repeatedly, the delivery is given up, and the event becomes a dead letter. Later
    events of the repository are delivered. `events retry` sends the dead letter again. The metrics count all of
    this."""
    with receiver_running() as receiver:
        receiver.status = lambda body: 400 if body["subject"] == "team/app:bad" else 200
        settings = '[metrics]\nallow = ["127.0.0.1"]\n' + webhook_table(receiver.url, max_attempts=2)
        with event_site(tmp_path, settings) as server:
            for tag in ("bad", "good"):
                push_image(server, "team/app", tag, tag)
            receiver.wait_for(lambda: subjects(receiver) == ["team/app:good"], "later event")
            (dead,) = deliveries(tmp_path, "--dead")
            assert (dead["event"]["tag"], dead["error"], dead["attempts"]) == ("bad", "it answered 400", 2)
            wait_until(lambda: "is given up: it answered 400" in server.log_text(), "a line about the dead letter")
            expected = {
                'entrepot_events_sent_total{webhook="hook"} 1.0',
                'entrepot_events_failed_attempts_total{outcome="refused",webhook="hook"} 2.0',
                'entrepot_events_given_up_total{webhook="hook"} 1.0',
                'entrepot_events_dead_letters{webhook="hook"} 1.0',
            }
            wait_until(lambda: expected <= set(metric_lines(server)), "the counts")
            receiver.status = lambda _: 200
            result = entrepot("events", "retry", str(dead["event"]["number"]), *SETTINGS, folder=tmp_path)
            assert (result.returncode, result.stderr) == (0, "1 event will be sent again\n")
            receiver.wait_for(lambda: subjects(receiver) == ["team/app:good", "team/app:bad"], "event again")
            wait_until(lambda: deliveries(tmp_path, "--dead") == [], "the dead letter to go")


def test_oldest_events_are_deleted_above_the_limit(tmp_path: Path) -> None:
    """If more than `max_pending` events wait for a receiver that is down, the oldest events are deleted, and the log
    has an error. Pushes still succeed."""
    with receiver_running() as receiver:
        receiver.status = lambda _: 503
        settings = "[events]\nmax_pending = 100\n" + webhook_table(receiver.url)
        with event_site(tmp_path, settings, workers=1) as server:
            for number in range(120):
                push_image(server, "team/app", f"v{number}", "first")
            wait_until(lambda: len(deliveries(tmp_path, "--pending", "--limit", "1000")) == 100, "the oldest to go")
            error = "events that wait for it were dropped, the oldest first"
            wait_until(lambda: error in server.log_text(), "a line about the dropped events")
            receiver.status = lambda _: 200
            receiver.wait_for(lambda: len(subjects(receiver)) == 100, "hundred events")
    assert subjects(receiver) == [f"team/app:v{number}" for number in range(20, 120)]


def check_receiver_after_outage(tmp_path: Path, seconds: float) -> None:
    """Checks that a receiver that responds with 503 for `seconds` gets every event afterwards, in order for each
    repository."""
    repositories = [f"team/app{number}" for number in range(5)]
    expected: dict[str, list[tuple[str, str]]] = {name: [] for name in repositories}
    with receiver_running() as receiver, event_site(tmp_path, webhook_table(receiver.url)) as server:
        for name in repositories:
            push_image(server, name, "v0", "first")
            expected[name].append(("pushed", f"{name}:v0"))
        receiver.wait_for(lambda: len(subjects(receiver)) == 5, "first events")
        receiver.status = lambda _: 503
        end_of_outage = time.monotonic() + seconds
        number = 0
        while number < 10 or time.monotonic() < end_of_outage:
            number += 1
            for name in repositories:
                push_image(server, name, f"v{number}", f"image {number}")
                expected[name].append(("pushed", f"{name}:v{number}"))
                if number % 3 == 0:
                    with plain_client(server.url) as client:
                        assert client.delete(f"/v2/{name}/manifests/v{number - 1}").status_code == 202
                    expected[name].append(("deleted", f"{name}:v{number - 1}"))
            time.sleep(seconds / 40)
        total = sum(map(len, expected.values()))
        assert {delivery["event"]["action"] for delivery in deliveries(tmp_path)} <= {"push", "delete"}
        receiver.status = lambda _: 200
        receiver.wait_for(lambda: len(first_events(receiver.accepted())) == total, f"all of {total} events")
    for name in repositories:
        bodies = [body for body in first_events(receiver.accepted()) if body["data"]["repository"] == name]
        assert [(body["type"].rpartition(".")[2], body["subject"]) for body in bodies] == expected[name]


def test_receiver_that_is_down_for_two_seconds(tmp_path: Path) -> None:
    """A receiver that responds with 503 for two seconds gets every event afterwards."""
    check_receiver_after_outage(tmp_path, 2)


@pytest.mark.slow
def test_receiver_that_is_down_for_a_minute(tmp_path: Path) -> None:
    """A receiver that responds with 503 for a minute gets every event afterwards."""
    check_receiver_after_outage(tmp_path, 60)
