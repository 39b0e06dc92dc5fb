"""Checks that find problems: of the server's settings and machine (`entrepot doctor`), of its upstreams (`entrepot
mirror test`), and of the configuration of clients (`entrepot client check`)."""
