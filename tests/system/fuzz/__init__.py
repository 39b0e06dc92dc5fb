"""Tests with malformed requests: thousands of generated requests, and hand-written requests of each kind."""
