"""Measures Entrepot: beside docker-registry (`python -m bench registries`), and as a store grows (`… growth`).

A program of its own, outside the wheel. Servers are separate processes, loaded by separate programs; their CPU time and
memory are read from /proc. docs/performance.md says how to run it and how to read what it prints.
"""
