"""docker while an attacker guesses passwords."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.loaders.login_storm import GUESSED_ACCOUNT, run_login_storm
from tests.fakes.clients.docker_engine import DockerEngine
from tests.fakes.clients.member_site import ClientLogin, MemberSite, logged_out

from .test_login_docker import attempt_login, log_in


def test_docker_logs_in_to_the_account_that_is_guessed_at(
    docker: DockerEngine, club: MemberSite, tmp_path: Path
) -> None:
    """From an address with an earlier login, a person can log in while an attacker guesses at the account from 16
    addresses without a pause. No guess succeeds, and clients with a token are served meanwhile."""
    me, login = logged_out(docker, tmp_path), ClientLogin(GUESSED_ACCOUNT, "a password of its own")
    club.done("POST", "/users", {"name": login.name, "password": login.secret})
    log_in(me, club.address, login)
    token = club.wire(login).ask("GET", "/token?service=entrepot").json()["token"]
    with ThreadPoolExecutor(1) as pool:
        storm = pool.submit(run_login_storm, club.server.port, token, 0, 250)
        logins = 0
        while not storm.done():
            log_in(me, club.address, login)
            logins += 1
        seen, _ = storm.result()
    assert logins
    assert seen.requests
    elsewhere = club.command("audit", "--target", login.name, "--outcome", "failed")
    assert "127.0.1." in elsewhere
    assert attempt_login(me, club.address, login).code == 0
