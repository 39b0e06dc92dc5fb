"""The command `entrepot mirror`."""
