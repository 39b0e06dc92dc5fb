"""Tests of the whole server over sockets."""
