"""Metrics, traces, and one log line for each HTTP request."""
