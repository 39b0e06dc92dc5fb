"""Helpers that tests of releases and installations share."""
