"""Measures Entrepot: beside docker-registry (`python -m bench registries`, `mirror`) and as a store grows (`growth`).

The bench is not part of the wheel. Servers and loaders are separate programs; /proc gives their CPU time and memory.
docs/en/performance.md explains how to run the bench and how to read its output.
"""
