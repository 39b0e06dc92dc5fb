"""Authentication and authorization: credentials, tokens, rights, and the guard, which checks the rights before each
call on a registry.

The module `revocation_across_workers` describes how the revocation of a right or credential takes effect in all worker
processes.
"""
