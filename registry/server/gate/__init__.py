"""Accepting connections: the listening socket, TLS, connection limits, trusted proxies."""
