"""The far registry: HTTP to upstreams, behind `registry.mirror.upstream_client.UpstreamClient`. Start at
`client.make_upstream_client`."""
