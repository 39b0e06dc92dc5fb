"""The files of a release, and installations of them."""
