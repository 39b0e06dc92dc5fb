"""What tests share: servers to start, fake upstreams and providers, clients, content."""
