"""Retention: deletes tags and untagged manifests that no rule in the settings keeps, in the repositories to which
clients push."""
