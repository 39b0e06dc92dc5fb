"""The bench `mirror`: compares Entrepot as a mirror with docker-registry in proxy mode. Both have the same upstream."""
