"""Rights: the principal (the account that sends a request), the policy that computes its rights from grants, and the
guard that checks these rights before each call on a registry."""
