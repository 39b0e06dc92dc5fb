"""Who may do what: the policy, the guard, and the responses to requests without the rights."""
