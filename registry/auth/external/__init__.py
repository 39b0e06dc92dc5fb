"""Identities that other services prove: OpenID Connect and trusted token issuers."""
