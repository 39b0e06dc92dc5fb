"""The bench `registries`: compares Entrepot with docker-registry, or with an older Entrepot."""
