"""The set-up of clients of this registry: the address at which clients reach it, and the files and commands that
configure each client."""
