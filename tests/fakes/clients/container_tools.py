"""podman, buildah and skopeo for tests, with storage, policy and logins that are separate from those of the host."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from .programs import ForeignProgram, environment

STORAGE = """
[storage]
driver = "vfs"
graphroot = "{folder}/root"
runroot = "{folder}/run"
"""

ENGINE = """
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
tmp_dir = "{folder}/tmp"
volume_path = "{folder}/volumes"
"""

# These options, and runc as the runtime, also work if the tests run inside a container: such a container allows these
# limits, and runc works with version 1 and version 2 of the kernel's control groups, and with a mix of both.
RUN = ("--rm", "--network", "host", "--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1000:1000")
INSECURE = "--tls-verify=false"


@dataclass(frozen=True)
class ContainerTools:
    """The three programs. podman and buildah share one storage."""

    podman: ForeignProgram
    buildah: ForeignProgram
    skopeo: ForeignProgram
    folder: Path

    def copy(self, source: str, target: str, *options: str, exact: bool = True) -> None:
        """Runs `skopeo copy`, with plain HTTP on both sides.

        With `exact`, skopeo must keep all digests. Otherwise it may send a layer in another compressed form that it has
        met in an earlier copy."""
        options = ("--src-tls-verify=false", "--dest-tls-verify=false", *options)
        self.skopeo("copy", "--quiet", *(["--preserve-digests"] if exact else []), *options, source, target)

    def image_id(self, name: str) -> str:
        return "sha256:" + self.podman("image", "inspect", "--format", "{{.Id}}", name).out.strip()

    def output_of(self, name: str, *args: str) -> str:
        """Runs a podman container of the image and returns its output."""
        return self.podman("run", *RUN, name, *args).out


def container_tools(folder: Path) -> ContainerTools:
    """Writes settings below `folder`, and returns the programs with an environment in which they use these settings."""
    home = folder / "home"
    env = environment(
        home,
        XDG_RUNTIME_DIR=str(folder / "xdg"),
        CONTAINERS_STORAGE_CONF=str(folder / "storage.conf"),
        CONTAINERS_CONF=str(folder / "containers.conf"),
        CONTAINERS_REGISTRIES_CONF=str(folder / "registries.conf"),
        REGISTRY_AUTH_FILE=str(folder / "auth.json"),
    )
    (folder / "xdg").mkdir()
    (folder / "storage.conf").write_text(STORAGE.format(folder=folder))
    (folder / "containers.conf").write_text(ENGINE.format(folder=folder))
    (folder / "registries.conf").write_text("unqualified-search-registries = []\n")
    (folder / "auth.json").write_text("{}")
    policy = home / ".config" / "containers" / "policy.json"
    policy.parent.mkdir(parents=True)
    policy.write_text(json.dumps({"default": [{"type": "insecureAcceptAnything"}]}))
    skopeo = ForeignProgram(("skopeo", "--policy", str(policy), "--tmpdir", str(home)), env)
    return ContainerTools(ForeignProgram(("podman",), env), ForeignProgram(("buildah",), env), skopeo, folder)
