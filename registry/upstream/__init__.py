"""HTTP client for upstream registries, from which the mirror fetches. `client.make_upstream_client` creates one; it
implements `registry.mirror.upstream_client.UpstreamClient`."""
