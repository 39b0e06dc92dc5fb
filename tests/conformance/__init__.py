"""Tests of the OCI distribution spec against a running server with two workers. The modules are named after headings of
the spec. The docstring of a test names the heading or the endpoint (`end-1` to `end-14`) that states the fact."""
