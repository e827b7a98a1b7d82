"""Numbers of held-out queries: evaluate, compare, test for significance."""
