"""Rights: who makes a request (the principal), what the grants allow them, and the guard before every registry call."""
