"""`entrepot mirror`."""
