"""Bad input: thousands of generated malformed requests, and tests for each kind of them."""
