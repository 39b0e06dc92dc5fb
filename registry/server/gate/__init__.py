"""Connections on their way in: listening socket, TLS, connection limits, trusted proxies."""
