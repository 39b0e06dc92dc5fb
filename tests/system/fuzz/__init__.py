"""Bad input and faults: thousands of malformed requests, and each kind by name."""
