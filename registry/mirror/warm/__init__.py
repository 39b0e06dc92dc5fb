"""Warming the mirror: fetches images into the cache before a client requests them."""
