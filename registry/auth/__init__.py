"""Who asks, and what they may do: credentials, tokens, rights, and the guard before every registry."""
