"""Tests of Entrepot on a minimal Debian system that has only Python and make."""
