"""One client connection: protocol, ASGI messages, timeouts, file transfer."""
