"""Entrepot's network service: the registry API, mirrors, accounts and the command line, on top of the library
`storage`."""

__version__ = "0.1.0"
