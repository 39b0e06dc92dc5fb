"""One client connection: its asyncio protocol object, its ASGI requests and responses, its timeouts, and its files."""
