"""Tables of the metadata database for accounts, groups, grants, tokens, signing keys, failed logins and the audit log.

A module `*_table` holds functions that take a connection; `sqlite_accounts` combines them.
"""
