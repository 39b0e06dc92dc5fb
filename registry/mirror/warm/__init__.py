"""Warming: fetching images before a client asks for them."""
