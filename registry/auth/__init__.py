"""Authentication and authorization: credentials, tokens, rights, and the guard before every registry."""
