"""Tables of the metadata database for accounts, groups, grants, tokens, signing keys, failed logins and the audit log.

The modules `*_table` and `login_tables` contain functions that take a connection. `sqlite_accounts` calls them: to read
on the event loop or in a thread, and to change something in the thread that commits.
"""
