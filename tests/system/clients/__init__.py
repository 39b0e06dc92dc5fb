"""Tests of a running Entrepot with real clients: docker with its own dockerd, podman, buildah, skopeo, containerd. The
folder `replay` has the requests of clients that cannot be installed here."""
