"""A library that stores the content of a container registry. It knows no HTTP and needs no web framework."""
