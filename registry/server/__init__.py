"""The HTTP server: processes, listening, connections, and HTTP/1.1 syntax."""
