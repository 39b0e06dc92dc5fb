"""A library that stores the content of a container registry. It has no code for HTTP and needs no web framework."""
