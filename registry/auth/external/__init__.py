"""Identities that others vouch for: OpenID Connect and trusted token issuers."""
