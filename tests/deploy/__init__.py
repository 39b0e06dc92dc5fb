"""Tests of the ways to deploy Entrepot, with the real programs. `make test-deploy` runs them; `make test` does not."""
