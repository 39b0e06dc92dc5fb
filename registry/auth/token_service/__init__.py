"""The token endpoint `/token`."""
