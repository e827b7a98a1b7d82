"""What people open: reports, model cards, curves."""
