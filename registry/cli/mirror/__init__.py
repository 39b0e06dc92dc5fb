"""The command `entrepot mirror`, which fetches, shows, refreshes, freezes and deletes cached images of upstreams."""
