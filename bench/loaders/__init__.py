"""Load generators: programs of their own, the same for all servers."""
