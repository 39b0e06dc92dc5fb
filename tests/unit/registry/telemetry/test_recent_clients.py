"""The server remembers when container clients, such as Docker, last sent a request from an address. The setup pages
show this."""

from __future__ import annotations

import os

from registry.asgi import Scope
from registry.telemetry.recent_clients import RECENT_SECONDS, RecentClients

AGENTS = {
    "docker": b"docker/29.0.0 go/go1.25 UpstreamClient(Docker-Client/29.0.0)",
    "containerd": b"containerd/v2.3.0",
    "podman": b"containers/5.36.0 (github.com/containers/image)",
    "buildkit": b"buildkit/v0.26",
}


def request(address: str, agent: bytes, port: int = 40000) -> Scope:
    return {"client": (address, port), "headers": [(b"accept", b"*/*"), (b"user-agent", agent)]}


class Clock:
    """A clock that stands still until a test moves it."""

    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def test_a_client_is_found_by_program_and_address() -> None:
    """A client program is found for up to an hour after its last request from the same address. For IPv6, all addresses
    of a network count as the same address. Each program is recorded separately."""
    clock = Clock()
    recent = RecentClients(clock)
    for port, (program, agent) in enumerate(AGENTS.items()):
        assert recent.last_seen("192.0.2.1", program) is None
        recent.record(request("192.0.2.1", agent, port))
        assert recent.last_seen("192.0.2.1", program) == clock.now
        assert recent.last_seen("192.0.2.2", program) is None
    recent.record(request("2001:db8::1", AGENTS["docker"]))
    assert recent.last_seen("2001:db8::2", "docker") == clock.now
    assert recent.last_seen("2001:db8:0:1::1", "docker") is None
    clock.now += RECENT_SECONDS
    assert recent.last_seen("192.0.2.1", "docker") is None


def test_requests_on_an_open_connection_are_recorded_again() -> None:
    """A later request on the same connection updates the time, and the time is kept even if the process then sees more
    connections than it can remember."""
    clock = Clock()
    recent, docker_request = RecentClients(clock), request("192.0.2.1", AGENTS["docker"])
    recent.record(docker_request)
    clock.now += 60
    recent.record(docker_request)
    for port in range(5000):
        recent.record(request("192.0.2.9", b"curl/8", port))
    assert recent.last_seen("192.0.2.1", "docker") == clock.now


def test_requests_of_other_programs_are_not_recorded() -> None:
    """Requests of other programs, requests without a User-Agent, and requests over a Unix socket, which have no
    address, are not recorded."""
    recent = RecentClients()
    recent.record(request("192.0.2.1", b"Mozilla/5.0 docker/29"))
    recent.record({"client": ("192.0.2.1", 1), "headers": []})
    recent.record({"client": None, "headers": [(b"user-agent", b"docker/29")]})
    assert {recent.last_seen("192.0.2.1", program) for program in AGENTS} == {None}


def test_worker_processes_share_the_records() -> None:
    """A request to one worker process is seen by all worker processes."""
    recent = RecentClients()
    child = os.fork()
    if not child:
        recent.record(request("192.0.2.1", AGENTS["docker"]))
        os._exit(0)
    os.waitpid(child, 0)
    assert recent.last_seen("192.0.2.1", "docker") is not None
