"""Rights: the principal (the account that sends a request), the policy that computes its rights from grants, and the
guard, which wraps a registry object and checks these rights before each call of its methods."""
