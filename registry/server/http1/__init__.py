"""HTTP/1.1 syntax: request heads, body framing, the server's own error responses."""
