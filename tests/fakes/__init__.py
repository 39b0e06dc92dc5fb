"""Helpers that many tests share: servers that tests start, fake upstreams and login providers, clients, and content."""
