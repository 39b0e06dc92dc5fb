"""HTTP/1.1 syntax: request and response heads, body framing, and the server's own error responses."""
