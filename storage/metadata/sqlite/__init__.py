"""Metadata, accounts and upstream records in an embedded SQLite database."""
