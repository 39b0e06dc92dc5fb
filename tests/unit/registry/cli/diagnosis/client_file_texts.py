"""Texts of configuration files of container clients, for tests of the doctor. They are as the clients' packages install
them, or as people posted them in the issues named here."""

from __future__ import annotations

CONTAINERD_1_7_DEFAULT = """
disabled_plugins = []
imports = []
oom_score = 0
plugin_dir = ""
required_plugins = []
root = "/var/lib/containerd"
state = "/run/containerd"
temp = ""
version = 2

[plugins]
  [plugins."io.containerd.grpc.v1.cri"]
    sandbox_image = "registry.k8s.io/pause:3.8"
    [plugins."io.containerd.grpc.v1.cri".registry]
      config_path = ""
      [plugins."io.containerd.grpc.v1.cri".registry.auths]
      [plugins."io.containerd.grpc.v1.cri".registry.configs]
      [plugins."io.containerd.grpc.v1.cri".registry.headers]
      [plugins."io.containerd.grpc.v1.cri".registry.mirrors]
"""
"""The part of `containerd config default` of 1.7 that is about registries."""

CONTAINERD_2_2_DEFAULT = """
version = 3
root = '/var/lib/containerd'
state = '/run/containerd'
disabled_plugins = []
imports = ['/etc/containerd/conf.d/*.toml']

[plugins]
  [plugins.'io.containerd.cri.v1.images']
    snapshotter = 'overlayfs'
    discard_unpacked_layers = false
    use_local_image_pull = false
    [plugins.'io.containerd.cri.v1.images'.pinned_images]
      sandbox = 'registry.k8s.io/pause:3.10.1'
    [plugins.'io.containerd.cri.v1.images'.registry]
      config_path = '/etc/containerd/certs.d:/etc/docker/certs.d'
  [plugins.'io.containerd.transfer.v1.local']
    config_path = ''
"""
"""The part of `containerd config default` of 2.2 that is about registries. `config_path` has a list of two directories,
but containerd 2.x takes the list as one directory (containerd #12808)."""

CONTAINERD_EKS = """
version = 3
root = "/var/lib/containerd"
state = "/run/containerd"

[plugins.'io.containerd.cri.v1.images']
discard_unpacked_layers = true

[plugins."io.containerd.cri.v1.images".registry]
config_path = "/etc/containerd/certs.d:/etc/docker/certs.d"
"""
"""The file on EKS. Here the list of directories works, because of `discard_unpacked_layers` (containerd #12415)."""

CONTAINERD_MIXED = """
version = 3

[plugins."io.containerd.grpc.v1.cri".registry]
  config_path = "/etc/containerd/certs.d"
"""
"""A file of version 3 with the section of version 2."""

CONTAINERD_WITHOUT_VERSION = """
[plugins."io.containerd.grpc.v1.cri".registry]
  config_path = "/etc/containerd/certs.d"
"""
"""A fragment of a file, copied without its version."""

CONTAINERD_IO_PACKAGE = """
#   Copyright 2018-2022 Docker Inc.
disabled_plugins = ["cri"]
#root = "/var/lib/containerd"
#state = "/run/containerd"
"""
"""The file of Docker's package containerd.io."""

CONTAINERD_INLINE_MIRRORS = """
version = 2

[plugins."io.containerd.grpc.v1.cri".registry.mirrors]
  [plugins."io.containerd.grpc.v1.cri".registry.mirrors."docker.io"]
    endpoint = ["https://registry-1.docker.io"]
"""

CONTAINERD_BOTH = """
version = 2

[plugins."io.containerd.grpc.v1.cri".registry]
  config_path = "/etc/containerd/certs.d"
  [plugins."io.containerd.grpc.v1.cri".registry.mirrors."docker.io"]
    endpoint = ["http://registry.example.com:5000"]
"""

CONTAINERD_GOOD_1_7 = CONTAINERD_1_7_DEFAULT.replace('config_path = ""', 'config_path = "/etc/containerd/certs.d"')
CONTAINERD_GOOD_2_2 = CONTAINERD_2_2_DEFAULT.replace(
    "'/etc/containerd/certs.d:/etc/docker/certs.d'", "'/etc/containerd/certs.d'"
)

HOSTS_TOML = """
server = "https://registry-1.docker.io"

[host."http://registry.example.com:5000"]
  capabilities = ["pull", "resolve"]
"""

PODMAN_FEDORA = """
unqualified-search-registries = ["registry.fedoraproject.org", "registry.access.redhat.com", "docker.io"]
short-name-mode = "enforcing"
"""
"""The lines of Fedora's /etc/containers/registries.conf that are not comments."""

PODMAN_OLD_FORMAT = """
[registries.search]
registries = ['registry.access.redhat.com', 'docker.io']

[registries.insecure]
registries = []

[registries.block]
registries = []
"""
"""The format of RHEL 7, which `containers-common` still reads."""

PODMAN_GOOD = """
[[registry]]
prefix = "docker.io"
location = "docker.io"

[[registry.mirror]]
location = "registry.example.com:5000/docker.io"
insecure = true

[[registry]]
location = "registry.example.com:5000"
insecure = true
"""
