"""Authentication and authorization: credentials, tokens, rights, and the guard before every registry.

`revocation_across_workers` describes how a revoked right or credential takes effect on all workers.
"""
