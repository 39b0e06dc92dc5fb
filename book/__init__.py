"""Builds the book: the documentation site from docs/en and docs/zh, and the pages that are generated from the code.

`make docs` writes the generated pages, and `make book` builds the site. The product does not import this package.
"""
