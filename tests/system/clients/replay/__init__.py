"""Requests of newer clients, replayed byte by byte, because these clients cannot be installed here."""
