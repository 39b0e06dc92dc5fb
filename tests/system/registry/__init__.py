"""The whole service over sockets."""
