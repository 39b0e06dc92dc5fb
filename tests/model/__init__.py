"""The stored registry against the reference model, driven by random steps."""
