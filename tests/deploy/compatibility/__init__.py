"""Tests that try container clients and record which of their steps work, for the table in docs/en/compatibility.md."""
