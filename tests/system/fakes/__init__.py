"""Tests of the test tools themselves: of the fake Docker Hub, and of the real registries that other tests use as
upstreams."""
