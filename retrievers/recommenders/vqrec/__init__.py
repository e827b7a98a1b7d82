"""VQ-Rec: a sequential recommender that represents an item by learned codes of its text."""
