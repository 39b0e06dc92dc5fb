"""Logins that depend on other services: an OpenID Connect provider, and trusted issuers of tokens."""
