"""Functions that return the set-up of each client, such as docker or k3s: configuration files, hints and commands
(`PROGRAM_SETUPS`). If the registry has accounts, a set-up includes the login.

Each function `_full_*_setup` completes a set-up of `registry.clients.client_setup`, such as that of `docker_setup`. It
leaves out files that the client does not need, and adds other parts, such as the command for a login.

Sources: k3s, "Private Registry Configuration"; kind, "Local Registry"; GitLab, "Use Docker to build Docker images";
docker/setup-buildx-action; containerd, docs/hosts.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final

from registry.clients.client_setup import (
    ClientSetup,
    Hint,
    MirroredHost,
    buildkit_setup,
    containerd_setup,
    docker_daemon_settings,
    docker_image_name_hints,
    docker_setup,
    hint,
    is_docker_mirror,
    podman_setup,
)
from registry.clients.registry_address import RegistryAddress
from registry.config import DOCKER_HUB

_K3S_FILE: Final = "/etc/rancher/k3s/registries.yaml"
_SYNOLOGY_FILE: Final = "/var/packages/ContainerManager/etc/dockerd.json"
_GITLAB_FILE: Final = ".gitlab-ci.yml"
_GITHUB_FILE: Final = ".github/workflows/image.yml"

SetupFunction = Callable[[RegistryAddress, Sequence[MirroredHost], bool], ClientSetup]
"""A function that returns the set-up of a client. The arguments: this registry's address, the hosts whose images this
registry mirrors, and whether this registry has accounts."""
_ROBOT_HINT: Final = hint(
    "NAME is a robot's name, and TOKEN its API token; to make them, run `entrepot robot add NAME`, `entrepot token add "
    "NAME` and `entrepot grant add 'team/**' pull,push robot:NAME`"
)


def _full_docker_setup(address: RegistryAddress, hosts: Sequence[MirroredHost], has_accounts: bool) -> ClientSetup:
    """Returns docker's set-up. If docker needs no configuration, the set-up has no file."""
    if docker_daemon_settings(address, hosts):
        setup, commands = docker_setup(address, hosts), ["systemctl reload docker"]
    else:
        setup, commands = ClientSetup((), tuple(docker_image_name_hints(address, hosts))), []
    if has_accounts:
        commands.append(f"docker login {address.host}")
    hints = (*setup.hints, *_docker_grant_hints(hosts, has_accounts))
    return ClientSetup(setup.files, hints, (*commands, f"docker push {address.host}/team/app"))


def _docker_grant_hints(hosts: Sequence[MirroredHost], has_accounts: bool) -> list[Hint]:
    """If docker uses this registry as its mirror and there are accounts, returns a hint to let everyone pull the
    mirrored images of Docker Hub, because docker sends no login to a mirror."""
    if not has_accounts or not is_docker_mirror(hosts):
        return []
    return [
        hint(
            "docker sends no login to a mirror, and pulls from Docker Hub itself if the mirror refuses a request; to "
            "let everyone pull mirrored images, run `entrepot grant add '{pattern}' pull everyone`",
            pattern=f"{DOCKER_HUB}/**",
        )
    ]


def _full_containerd_setup(address: RegistryAddress, hosts: Sequence[MirroredHost], has_accounts: bool) -> ClientSetup:
    setup = containerd_setup(address, hosts)
    files = (*setup.files, *_plain_http_hosts_toml(address))
    hints = [*(setup.hints if files else ()), *_containerd_grant_hints(hosts, has_accounts)]
    if has_accounts:
        hints.append(_ROBOT_HINT)
    return ClientSetup(files, tuple(hints), _pull_secret(address) if has_accounts else ())


def _plain_http_hosts_toml(address: RegistryAddress) -> list[tuple[str, str]]:
    """Returns the path and content of the hosts.toml that makes containerd use plain HTTP for images whose names begin
    with this registry's host. Returns an empty list if the registry has TLS."""
    if not address.is_plain_http:
        return []
    path = f"/etc/containerd/certs.d/{address.host}/hosts.toml"
    url = json.dumps(address.url)
    content = f'# {path}\nserver = {url}\n\n[host.{url}]\n  capabilities = ["pull", "resolve", "push"]\n'
    return [(path, content)]


def _containerd_grant_hints(hosts: Sequence[MirroredHost], has_accounts: bool) -> list[Hint]:
    """If there are accounts, returns a hint for each upstream to let everyone pull the upstream's images, because
    containerd sends no login to a mirror."""
    if not has_accounts:
        return []
    return [
        hint(
            "containerd sends no login for mirrored images; to let everyone pull them, run "
            "`entrepot grant add '{pattern}' pull everyone`",
            pattern=f"{name}/**",
        )
        # Grants are for repository names, which begin with the upstream's name. Several hosts can belong to one
        # upstream.
        for name in dict.fromkeys(host.upstream for host in hosts)
    ]


def _pull_secret(address: RegistryAddress) -> tuple[str, ...]:
    """Returns the command that stores a login in a Kubernetes cluster, for `imagePullSecrets`."""
    options = f"--docker-server={address.host} --docker-username=NAME --docker-password=TOKEN"
    return (f"kubectl create secret docker-registry entrepot {options}",)


def k3s_setup(address: RegistryAddress, hosts: Sequence[MirroredHost], has_accounts: bool) -> ClientSetup:
    """Returns k3s's registries.yaml. Each host in the file has this registry's URL as its endpoint. containerd names
    the host of the image in the query of its requests (`?ns=HOST`)."""
    names = [host.prefix for host in hosts]  # the hosts at the beginning of image names
    if address.is_plain_http:
        names.append(address.host)  # without this entry, containerd uses https for the images of this registry
    lines = ["mirrors:"] if names else []
    for name in names:
        lines += [f"  {json.dumps(name)}:", "    endpoint:", f"      - {json.dumps(address.url)}"]
    if has_accounts:
        lines += ["configs:", f"  {json.dumps(address.host)}:", "    auth:", "      username: NAME"]
        lines.append("      password: TOKEN")
    files = (((_K3S_FILE, "\n".join([f"# {_K3S_FILE}, on each node", *lines]) + "\n"),)) if lines else ()
    hints = [hint("each node needs the file; on agents, restart k3s-agent in place of k3s")] if files else []
    if has_accounts:
        hints.append(_ROBOT_HINT)
    commands = ("systemctl restart k3s",) if files else ()
    return ClientSetup(files, tuple(hints), commands)


def kind_setup(address: RegistryAddress, hosts: Sequence[MirroredHost], has_accounts: bool) -> ClientSetup:
    """Returns containerd's hosts.toml files, and a kind.yaml that mounts the directory with these files into the node.
    If containerd needs no hosts.toml file, returns no file."""
    setup = _full_containerd_setup(address, hosts, has_accounts)
    hints = []
    if address.docker_accepts_plain_http:  # true only for loopback addresses
        hints.append(
            hint(
                "{host} is a loopback address, which nodes in containers do not reach: use the address that this "
                "machine has in its network",
                host=address.host,
            )
        )
    hints += _containerd_grant_hints(hosts, has_accounts)
    if has_accounts:
        hints.append(_ROBOT_HINT)
    if not setup.files:
        return ClientSetup((), tuple(hints), ("kind create cluster", *setup.commands))
    folder = "/etc/containerd/certs.d"
    cluster = (
        "kind: Cluster\n"
        "apiVersion: kind.x-k8s.io/v1alpha4\n"
        "containerdConfigPatches:  # nodes of kind 0.27 and later need no patch\n"
        "  - |-\n"
        '    [plugins."io.containerd.grpc.v1.cri".registry]\n'
        f'      config_path = "{folder}"\n'
        "nodes:\n"
        "  - role: control-plane  # each node needs the mount\n"
        "    extraMounts:\n"
        "      - hostPath: ./certs.d\n"
        f"        containerPath: {folder}\n"
    )
    files = [("kind.yaml", cluster)]
    files += [(path.replace(f"{folder}/", "certs.d/"), text) for path, text in setup.files]
    hints.insert(0, hint("put all files into one directory, and run the command there"))
    return ClientSetup(tuple(files), tuple(hints), ("kind create cluster --config kind.yaml", *setup.commands))


def nas_setup(address: RegistryAddress, hosts: Sequence[MirroredHost], has_accounts: bool) -> ClientSetup:
    """Returns the set-up of Synology's Container Manager and similar systems. People either fill in a form or change
    docker's configuration file."""
    daemon = docker_daemon_settings(address, hosts)
    hints = [
        hint("in Container Manager: Registry, Settings, Add; the URL is {url}", url=address.url),
        hint("other NAS systems ask for the same URL in the settings of their registries"),
    ]
    if "registry-mirrors" in daemon:
        hints.insert(
            1,
            hint(
                "to mirror Docker Hub: select Docker Hub in the list of registries, click Edit, turn on Enable "
                "registry mirror, and enter this registry's URL"
            ),
        )
    if has_accounts:
        hints.append(hint("fill in an account's name and, as the password, its API token; a robot account suffices"))
    hints += _docker_grant_hints(hosts, has_accounts)
    hints += docker_image_name_hints(address, hosts)
    if not daemon:
        return ClientSetup((), tuple(hints))
    hints.append(
        hint(
            "the file has the same effect as the form: instead of filling in the form, you can merge these lines into "
            "the file"
        )
    )
    content = json.dumps(daemon, indent=2) + "\n"
    commands = ("synopkg restart ContainerManager",)
    return ClientSetup(((_SYNOLOGY_FILE, content),), tuple(hints), commands)


def ci_setup(address: RegistryAddress, hosts: Sequence[MirroredHost], has_accounts: bool) -> ClientSetup:
    """Returns jobs for GitLab and GitHub. The jobs use this registry as a mirror, build an image and push the image to
    this registry."""
    hints = [
        hint("the runners have to reach {url}", url=address.url),
        hint(
            "a GitLab runner of your own needs this in [runners.docker] of its config.toml: {settings}",
            settings='privileged = true, volumes = ["/certs/client", "/cache"]',
        ),
    ]
    hints += _docker_grant_hints(hosts, has_accounts)
    hints += docker_image_name_hints(address, hosts)
    if has_accounts and address.is_plain_http:
        hints.append(
            hint(
                "docker/login-action logs in with the docker of GitHub's runner, whose daemon.json needs: {settings}",
                settings=f'"insecure-registries": ["{address.host}"]',
            )
        )
    if has_accounts:
        hints += [
            hint("ENTREPOT_ROBOT and ENTREPOT_TOKEN are variables of the project: the name and the token of a robot"),
            _ROBOT_HINT,
        ]
    files = (
        (_GITLAB_FILE, _gitlab_job(address, hosts, has_accounts)),
        (_GITHUB_FILE, _github_job(address, hosts, has_accounts)),
    )
    return ClientSetup(files, tuple(hints))


def _gitlab_job(address: RegistryAddress, hosts: Sequence[MirroredHost], has_accounts: bool) -> str:
    daemon = docker_daemon_settings(address, hosts)
    options = [text for url in daemon.get("registry-mirrors", ()) for text in ("--registry-mirror", url)]
    # docker needs no option for a loopback address. But a job runs in a container and cannot reach a loopback address,
    # so people must edit this file and write another address. For the other address, docker needs the option.
    if address.is_plain_http:
        options += ["--insecure-registry", address.host]
    image = f"{address.host}/team/app:$CI_COMMIT_SHORT_SHA"
    login = f'docker login --username "$ENTREPOT_ROBOT" --password-stdin {address.host}'
    lines = [
        "build-image:",
        "  image: docker:cli",
        "  variables:",
        '    DOCKER_TLS_CERTDIR: "/certs"',
        "  services:",
        "    - name: docker:dind",
        *([f"      command: {json.dumps(options)}"] if options else []),
        *(["  before_script:", f'    - echo "$ENTREPOT_TOKEN" | {login}'] if has_accounts else []),
        "  script:",
        f"    - docker build --tag {image} .",
        f"    - docker push {image}",
    ]
    return "\n".join(lines) + "\n"


def _github_job(address: RegistryAddress, hosts: Sequence[MirroredHost], has_accounts: bool) -> str:
    # The comments of buildkitd.toml say where the file is on a machine, so they are left out.
    config_lines = [
        line for line in buildkit_setup(address, hosts).files[0][1].splitlines() if not line.startswith("#")
    ]
    inline_lines = [f"            {line}".rstrip() for line in "\n".join(config_lines).strip().splitlines()]
    lines = [
        "on: push",
        "jobs:",
        "  image:",
        "    runs-on: ubuntu-latest",
        "    steps:",
        "      - uses: actions/checkout@v4",
        "      - uses: docker/setup-buildx-action@v3",
        *(["        with:", "          buildkitd-config-inline: |", *inline_lines] if inline_lines else []),
    ]
    if has_accounts:
        lines += [
            "      - uses: docker/login-action@v3",
            "        with:",
            f"          registry: {address.host}",
            "          username: ${{ vars.ENTREPOT_ROBOT }}",
            "          password: ${{ secrets.ENTREPOT_TOKEN }}",
        ]
    lines += [
        "      - uses: docker/build-push-action@v6",
        "        with:",
        "          push: true",
        f"          tags: {address.host}/team/app:${{{{ github.sha }}}}",
    ]
    return "\n".join(lines) + "\n"


def _full_podman_setup(address: RegistryAddress, hosts: Sequence[MirroredHost], has_accounts: bool) -> ClientSetup:
    setup = podman_setup(address, hosts)
    if not hosts and not address.is_plain_http:  # the file would contain only comments
        setup = replace(setup, files=())
    login = (f"podman login {address.host}",) if has_accounts else ()
    return replace(setup, commands=(*login, f"podman push {address.host}/team/app"))


def _full_buildkit_setup(address: RegistryAddress, hosts: Sequence[MirroredHost], has_accounts: bool) -> ClientSetup:
    setup = buildkit_setup(address, hosts)
    if not hosts and not address.is_plain_http:  # the file would contain only comments
        setup = ClientSetup((), ())
    return replace(setup, commands=(f"docker login {address.host}",) if has_accounts else ())


PROGRAM_SETUPS: Final[Mapping[str, SetupFunction]] = {
    "docker": _full_docker_setup,
    "podman": _full_podman_setup,
    "containerd": _full_containerd_setup,
    "k3s": k3s_setup,
    "kind": kind_setup,
    "buildkit": _full_buildkit_setup,
    "nas": nas_setup,
    "ci": ci_setup,
}
"""The set-up function of each client, by the client's name, in the order of the set-up page
(`registry.ui.setup_page`)."""
