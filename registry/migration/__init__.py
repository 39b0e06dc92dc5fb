"""Moving in from another registry: takes over its directory, copies its content over the network, and translates its
settings."""
