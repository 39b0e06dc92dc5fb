"""Load generators (loaders). Each loader runs as a separate program. All servers are measured with the same loaders."""
