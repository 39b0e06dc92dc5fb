"""Tests of the contract of `storage.interface.Registry`. They run on every implementation of this interface.

Other tests here make random calls on the stored registry and on a reference model, and compare the results.
"""
