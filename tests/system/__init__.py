"""Tests that start server processes and real clients."""
