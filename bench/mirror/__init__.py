"""Entrepot as a mirror, beside docker-registry in proxy mode, both with the same upstream."""
