"""Accounts, groups, grants, tokens, keys and the audit log in the metadata database: functions of a connection."""
