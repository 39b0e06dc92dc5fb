"""Commands for the person on call: what the server does, and what is wrong."""
