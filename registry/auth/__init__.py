"""Authentication and authorization: credentials, tokens, rights, and the guard. The guard wraps a registry object
(`storage.interface.Registry`) and checks the rights before each call of its methods.

The module `revocation_across_workers` describes how the revocation of a right or credential takes effect in all worker
processes.
"""
