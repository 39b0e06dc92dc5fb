"""Tests of the rights: the policy, the guard, and the responses to requests without the needed rights."""
