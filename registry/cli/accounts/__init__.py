"""The subcommands for accounts, groups, grants, API tokens, signing keys and the audit log."""
