"""The commands for accounts, groups, grants, API tokens, signing keys and the audit log: `entrepot user`, `robot`,
`group`, `grant`, `token`, `key` and `audit`."""
