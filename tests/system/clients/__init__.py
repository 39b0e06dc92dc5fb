"""Real clients against a real Entrepot: docker with its own dockerd, podman, buildah, skopeo, containerd, raw HTTP."""
