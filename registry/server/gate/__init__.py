"""Accepting connections: the listening socket, the TLS certificate, the limits of connections, and trusted proxies."""
