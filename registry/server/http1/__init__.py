"""HTTP/1.1 syntax: the heads of requests and responses, the framing of request bodies, and error responses."""
