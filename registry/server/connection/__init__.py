"""One client connection: its asyncio protocol, ASGI messages, timeouts, and sending of files."""
