"""HTTP client for upstream registries. Implements `registry.mirror.upstream_client.UpstreamClient`; start at
`client.make_upstream_client`."""
