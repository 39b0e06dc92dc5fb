"""Stores metadata, accounts, and the mirror's records about its upstream registries in an embedded SQLite database.

`commit_thread` commits every change and makes it durable. With `cross_process_change_counter`, a worker (a server
process) notices that another worker has committed a change.
"""
