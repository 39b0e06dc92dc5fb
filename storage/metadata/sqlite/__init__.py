"""Stores metadata, accounts, and what the mirror learned about its upstream registries, in an embedded SQLite database.

`commit_thread` commits every change and makes it durable. With `cross_process_change_counter`, a worker (a server
process) notices that another worker has committed a change.
"""
