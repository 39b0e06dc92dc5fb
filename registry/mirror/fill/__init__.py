"""Fills. A fill is the download of one blob from an upstream registry, which any number of readers follow."""
