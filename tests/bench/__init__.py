"""Tests of the benchmarks in `bench`: their arithmetic, their parsers, and the stores that they make."""
