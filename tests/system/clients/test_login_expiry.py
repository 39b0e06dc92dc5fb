"""A test with pushes that take longer than the lifetime of a bearer token."""

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
from tests.fakes.clients.member_site import SiteWithAccounts, logged_out, tools_logged_out
from tests.fakes.clients.programs import wait_until
from tests.fakes.clients.registry_client import assert_same_files

from .test_login_docker import log_in
from .test_podman import loaded

LIFETIME = 60.0
"""The lifetime of a bearer token in seconds. It cannot be shorter, because docker treats every token as valid for at
least 60 s."""


@pytest.mark.timeout(300)
def test_a_token_that_expires_in_the_middle_of_a_push(
    docker: DockerEngine, tools: ContainerTools, ctr: Containerd, site: SiteWithAccounts, repo: str, tmp_path: Path
) -> None:
    """docker, podman, skopeo and containerd each push a layer over a connection that stays very slow until the client's
    token has expired. The running request continues. For the next request, the client requests a new token. The pushed
    image is complete."""
    login = site.add_user({f"{repo}/**": "pull,push"})
    test_image = image(repo, layer({"heavy": noise(repo, 4 * MIB)}))
    user, layout = f"{login.name}:{login.secret}", write_layout(tmp_path / "in", {"x": test_image})
    (tmp_path / "docker").mkdir()
    my_docker, tools = logged_out(docker, tmp_path / "docker"), tools_logged_out(tools, tmp_path)
    ctr.load(test_image, "localhost/slow:1", tmp_path / "ctr")
    loaded(tools, test_image, "localhost/slow", tmp_path / "podman")

    def docker_push(name: str) -> None:
        log_in(my_docker, name.partition("/")[0], login)
        my_docker.load(test_image, name)
        my_docker("push", name)

    pushes: dict[str, Callable[[str], object]] = {
        "docker": docker_push,
        "podman": lambda name: tools.podman("push", INSECURE, "--creds", user, "localhost/slow", f"docker://{name}"),
        "skopeo": lambda name: tools.copy(f"oci:{layout}:x", f"docker://{name}", "--dest-creds", user),
        "ctr": lambda name: ctr.push(name, "localhost/slow:1", "--user", user),
    }
    with ExitStack() as stack, ThreadPoolExecutor(len(pushes)) as pool:
        proxies = {client: stack.enter_context(cutting_proxy(site.address)) for client in pushes}
        for proxy in proxies.values():
            proxy.slow_upload_after(2 * MIB)
        running_pushes = [
            pool.submit(push, f"{proxies[client].address}/{repo}/{client}:1") for client, push in pushes.items()
        ]
        for proxy in proxies.values():
            assert proxy.slow.wait(60), (proxy.sent, proxy.request_lines)
        token_requests_before = {client: token_requests(proxy) for client, proxy in proxies.items()}
        # Each client already has its token, which expires at this time at the latest.
        expires_at = time.time() + LIFETIME
        wait_until(lambda: time.time() > expires_at, LIFETIME + 30, lambda: "the clock stands still")
        for proxy in proxies.values():
            proxy.speed_up()
        for running in running_pushes:
            running.result()
        for client, proxy in proxies.items():
            assert token_requests(proxy) > token_requests_before[client] > 0, client
            assert_same_files(site.client(), f"{repo}/{client}", "1", test_image)
    ctr.forget("localhost/slow:1")


def token_requests(proxy: CuttingProxy) -> int:
    return sum("/token" in request for request in proxy.request_lines)
