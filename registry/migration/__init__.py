"""Migration from another registry: imports its directory, copies its content over the network, and translates its
settings."""
