"""Facts that hold for every `storage.interface.Registry`, whatever is behind it.

The stored registry against the reference model, driven by random steps.
"""
