"""Credentials that this registry issues: bearer tokens, API tokens, login sessions, and the keys that sign them."""
