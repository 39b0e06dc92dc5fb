"""The commands for accounts, groups, grants, tokens, keys and the audit log."""
