"""What a principal may do: principals, policy, and the guard before every registry call."""
