"""The bench `upkeep`: measures garbage collection and cache eviction on stores of several sizes, and the latency of
clients' requests meanwhile."""
