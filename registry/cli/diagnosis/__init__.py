"""Finds out what is wrong: with the server's settings and its machine (`entrepot doctor`), with its upstreams
(`entrepot mirror test`), and with the configuration of clients (`entrepot client check`)."""
