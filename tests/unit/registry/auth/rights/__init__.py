"""Who may do what: the policy, the guard, and what HTTP says of both."""
