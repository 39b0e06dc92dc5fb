"""Tests of the fake upstream."""
