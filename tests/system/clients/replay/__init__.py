"""Tests that send the requests of newer clients byte by byte, because these clients cannot be installed here."""
