"""Tests of the files of a release, and of their installation."""
