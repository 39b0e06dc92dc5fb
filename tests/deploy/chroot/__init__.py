"""Entrepot on a plain Debian with nothing but Python and make."""
