"""Pushes that take longer than the lifetime of a token."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.fakes.client_images import MIB, image, layer, noise, write_layout
from tests.fakes.clients.container_tools import INSECURE, ContainerTools
from tests.fakes.clients.containerd_daemon import Containerd
from tests.fakes.clients.cutting_proxy import CuttingProxy, cutting_proxy
from tests.fakes.clients.docker_engine import DockerEngine
from tests.fakes.clients.member_site import MemberSite, logged_out, tools_logged_out
from tests.fakes.clients.programs import wait_until
from tests.fakes.clients.registry_client import assert_same_files

from .test_login_docker import log_in
from .test_podman import loaded

LIFETIME = 60.0
"""Seconds; the shortest that a token can be given, since docker takes none to live less."""


@pytest.mark.timeout(300)
def test_a_token_that_expires_in_the_middle_of_a_push(
    docker: DockerEngine, tools: ContainerTools, ctr: Containerd, club: MemberSite, repo: str, tmp_path: Path
) -> None:
    """docker, podman, skopeo and containerd each push a layer over a connection that is very slow until their token has
    expired. The running request continues. For the next request they get another token, and the image is complete."""
    login = club.person({f"{repo}/**": "pull,push"})
    made = image(repo, layer({"heavy": noise(repo, 4 * MIB)}))
    user, layout = f"{login.name}:{login.secret}", write_layout(tmp_path / "in", {"x": made})
    (tmp_path / "docker").mkdir()
    me, tools = logged_out(docker, tmp_path / "docker"), tools_logged_out(tools, tmp_path)
    ctr.load(made, "localhost/slow:1", tmp_path / "ctr")
    loaded(tools, made, "localhost/slow", tmp_path / "podman")

    def docker_push(name: str) -> None:
        log_in(me, name.partition("/")[0], login)
        me.load(made, name)
        me("push", name)

    pushes: dict[str, Callable[[str], object]] = {
        "docker": docker_push,
        "podman": lambda name: tools.podman("push", INSECURE, "--creds", user, "localhost/slow", f"docker://{name}"),
        "skopeo": lambda name: tools.copy(f"oci:{layout}:x", f"docker://{name}", "--dest-creds", user),
        "ctr": lambda name: ctr.push(name, "localhost/slow:1", "--user", user),
    }
    with ExitStack() as stack, ThreadPoolExecutor(len(pushes)) as pool:
        lines = {client: stack.enter_context(cutting_proxy(club.address)) for client in pushes}
        for line in lines.values():
            line.slow_upload_after(2 * MIB)
        done = [pool.submit(push, f"{lines[client].address}/{repo}/{client}:1") for client, push in pushes.items()]
        for line in lines.values():
            assert line.slow.wait(60), (line.sent, line.asked)
        asked_before = {client: tokens_asked_for(line) for client, line in lines.items()}
        expired = time.time() + LIFETIME
        wait_until(lambda: time.time() > expired, LIFETIME + 30, lambda: "the clock stands still")
        for line in lines.values():
            line.speed_up()
        for each in done:
            each.result()
        for client, line in lines.items():
            assert tokens_asked_for(line) > asked_before[client] > 0, client
            assert_same_files(club.wire(), f"{repo}/{client}", "1", made)
    ctr.forget("localhost/slow:1")


def tokens_asked_for(line: CuttingProxy) -> int:
    return sum("/token" in request for request in line.asked)
