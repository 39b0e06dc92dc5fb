"""Metadata, accounts and upstream records in an embedded SQLite database.

A change becomes durable in `commit_thread`. Workers notice each other's changes with `cross_process_change_counter`.
"""
