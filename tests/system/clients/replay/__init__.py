"""What newer clients send, replayed byte by byte where they cannot be installed."""
