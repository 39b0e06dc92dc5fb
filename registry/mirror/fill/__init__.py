"""Fills: the download of one blob, followed by any number of readers."""
