"""Entrepot, the network service over `storage`."""

__version__ = "0.1.0"
