"""Benchmarks of Entrepot. `python -m bench registries` and `mirror` compare it with docker-registry; `growth` and
`upkeep` measure how it changes as a store grows.

The bench is not part of the wheel. Servers and loaders are separate programs; /proc gives their CPU time and memory.
docs/en/performance.md explains how to run the bench and how to read its output.
"""
