"""The far registry: HTTP to upstreams, behind `registry.mirror.source.Source`. Start at `client.make_source`."""
