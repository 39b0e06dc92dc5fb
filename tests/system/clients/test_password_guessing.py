"""A test with docker while an attacker guesses the password of an account."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.loaders.login_storm import GUESSED_ACCOUNT, run_login_storm
from tests.fakes.clients.docker_engine import DockerEngine
from tests.fakes.clients.member_site import ClientLogin, SiteWithAccounts, logged_out

from .test_login_docker import attempt_login, log_in


def test_docker_can_log_in_while_an_attacker_guesses(
    docker: DockerEngine, site: SiteWithAccounts, tmp_path: Path
) -> None:
    """An attacker sends wrong passwords for an account from 16 addresses without a pause. Meanwhile, docker can log in
    to this account from an address with an earlier login, and requests with a bearer token are served."""
    my_docker, login = logged_out(docker, tmp_path), ClientLogin(GUESSED_ACCOUNT, "a password of its own")
    site.call_ok("POST", "/users", {"name": login.name, "password": login.secret})
    log_in(my_docker, site.address, login)
    token = site.client(login).ask("GET", "/token?service=entrepot").json()["token"]
    with ThreadPoolExecutor(1) as pool:
        storm = pool.submit(run_login_storm, site.server.port, token, number=0, logins=120)
        logins = 0
        while not storm.done():
            log_in(my_docker, site.address, login)
            logins += 1
        token_client, _ = storm.result()
    assert logins
    assert token_client.requests
    failed_logins = site.command("audit", "--target", login.name, "--outcome", "failed")
    assert "127.0.1." in failed_logins  # the addresses of the attacker
    assert attempt_login(my_docker, site.address, login).code == 0
