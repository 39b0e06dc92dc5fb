"""What tests share: servers that they start, fake upstreams and providers, clients, and content."""
