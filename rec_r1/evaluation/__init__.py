"""Evaluate systems on held-out queries, compare them, and test whether the differences are significant."""
