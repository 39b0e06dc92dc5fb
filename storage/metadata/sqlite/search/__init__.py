"""The search index in the metadata database."""
